"""Arithmetic of stage 2: how much each neuron answers to each modality's tokens.

Pure functions on tensors: they know no model, never wait for a GPU, and take no gradient.
Positions in no mask (padding) have no part in any result, but must be finite.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from miner_lens.models.precision import full_precision

METRICS = ("prob", "mean", "max", "attn_k", "attn_q")
# MINER's five, and what is scored only where it is asked for.
ALL_METRICS = (*METRICS, "attended")

# What attention itself is given: True where a query sees a key, or what is added to QK^T.
AttentionMask = Bool[Tensor, "#batch #head #query #key"] | Float[Tensor, "#batch #head #query #key"]

# Elements of an attention pattern that may be held between two passes over it: 64 MB and 512 MB.
_KEPT_ON_CPU, _KEPT_ON_ACCELERATOR = 2**24, 2**27


@dataclass(frozen=True)
class Segments:
    """Stretches of positions that attend only to themselves, as the patches of an image do.

    Attributes:
        stops: The position after each stretch: numbers, to be looked up without asking a device.
        index: Which stretch each position is in, on the device of the queries.
    """

    stops: tuple[int, ...]
    index: Int[Tensor, " pos"]

    @classmethod
    def of(cls, numbers: Int[Tensor, " pos"], device: torch.device | str = "cpu") -> Segments:
        """From numbers on the CPU, each other than the one before where a stretch begins.

        Example:
            >>> Segments.of(torch.tensor([4, 4, 6])).stops
            (2, 3)
        """
        _, index, counts = torch.unique_consecutive(
            numbers, return_inverse=True, return_counts=True
        )
        return cls(tuple(counts.cumsum(0).tolist()), index.to(device))

    def around(self, start: int, stop: int) -> tuple[int, int]:
        """From where to where the stretches reach that some positions are in."""
        place = bisect_right(self.stops, start)
        first = self.stops[place - 1] if place else 0
        return first, self.stops[bisect_right(self.stops, stop - 1)]


@full_precision()
def head_mean_attention(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head pos d_head"],
    causal: bool = False,
    mask: Bool[Tensor, "batch pos"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch query key"]:
    """Attention pattern averaged over heads, in fp32, without a `[head, query, key]` tensor.

    Args:
        q: Queries after rotary embedding.
        k: Keys after rotary embedding; with grouped-query attention they have fewer heads.
        causal: Whether a query sees only the keys up to its own position. The published
            MINER code sees all of them, hence the default.
        mask: True at real tokens. Padding keys get no weight; rows of padding queries are 0.
        scale: What QK^T is multiplied by; default 1 / sqrt(d_head).

    Raises:
        ValueError: If the key heads do not divide the query heads, or there are not as many keys
            as queries.

    Example:
        >>> q = k = torch.zeros(1, 2, 3, 4)
        >>> head_mean_attention(q, k, causal=True)[0, 1]
        tensor([0.5000, 0.5000, 0.0000])
    """
    pattern = _Pattern(q, k, causal, mask, scale=scale)
    batch, _, pos, _ = q.shape
    attention = q.new_zeros(batch, pos, pos, dtype=torch.float32)
    for start, stop in pattern.chunks():
        attention[:, start:stop] = pattern.rows(start, stop)
    return attention if mask is None else attention.masked_fill_(~mask[:, :, None], 0.0)


class _Pattern:
    """Rows of the head-mean attention pattern, computed when asked for."""

    def __init__(
        self,
        q: Float[Tensor, "batch head pos d_head"],
        k: Float[Tensor, "batch kv_head pos d_head"],
        causal: bool,
        mask: Bool[Tensor, "batch pos"] | None = None,
        segments: Segments | None = None,
        scale: float | None = None,
        attention_mask: AttentionMask | None = None,
    ) -> None:
        self.batch, self.heads, self.pos, d_head = q.shape
        kv_heads = k.shape[1]
        if self.heads % kv_heads:
            raise ValueError(
                f"q has {self.heads} heads and k has {kv_heads}; every key head must serve the "
                f"same number of query heads. Pass k as the model's k_proj gives it, or repeat its "
                f"heads."
            )
        if k.shape[2] != self.pos:
            raise ValueError(
                f"q has {self.pos} positions and k has {k.shape[2]}. Pass a whole prompt, not a "
                f"step of generation."
            )
        self.group = self.heads // kv_heads
        self.q = rearrange(
            q.detach(),
            "batch (kv_head group) query d_head -> kv_head batch group query d_head",
            group=self.group,
        )
        self.k = rearrange(
            k.detach().float(), "batch kv_head key d_head -> kv_head batch d_head key"
        )
        self.scale = d_head**-0.5 if scale is None else scale
        self.causal = causal
        self.mask = mask
        self.attention_mask = None
        if attention_mask is not None:
            self.mask = None  # which keys are padding is part of it
            self.attention_mask = rearrange(
                attention_mask.detach().expand(self.batch, self.heads, self.pos, self.pos),
                "batch (kv_head group) query key -> kv_head batch group query key",
                group=self.group,
            )
        self.segments = segments
        self.index = torch.arange(self.pos, device=q.device)
        self.segment_of = None if segments is None else segments.index.to(q.device)

    def chunks(self) -> Iterable[tuple[int, int]]:
        """Row ranges small enough for one head's scores to stay in cache."""
        return _chunks(self.pos, self.batch * self.group * self.pos, self.q.device)

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch query key"]:
        """The pattern of some queries over all keys."""
        first, last = self._keys(start, stop)
        hidden = self._hidden(start, stop, first, last)
        total = self.k.new_zeros(self.batch, stop - start, self.pos)
        for head, (queries, keys) in enumerate(zip(self.q, self.k, strict=True)):
            some = queries[:, :, start:stop].float() * self.scale
            some = rearrange(some, "batch group query d_head -> batch (group query) d_head")
            scores = torch.bmm(some, keys[:, :, first:last])
            scores = scores.view(self.batch, self.group, stop - start, last - first)
            if self.attention_mask is not None:
                masked = self.attention_mask[head, :, :, start:stop, first:last].to(scores.device)
                if masked.dtype == torch.bool:
                    scores.masked_fill_(~masked, torch.finfo(torch.float32).min)
                else:
                    scores += masked
            if hidden is not None:
                # Not -inf: a row that sees nothing stays finite.
                scores.masked_fill_(hidden, torch.finfo(torch.float32).min)
            total[:, :, first:last] += scores.softmax(-1).sum(1)
        return total.div_(self.heads)

    def _keys(self, start: int, stop: int) -> tuple[int, int]:
        """The keys outside of which these queries have no weight."""
        first, last = 0, self.pos
        if self.segments is not None:
            first, last = self.segments.around(start, stop)
        return first, min(last, stop) if self.causal else last

    def _hidden(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        """True where a query does not see a key, to be broadcast over [batch group query key]."""
        hidden = None
        if self.causal:
            hidden = self.index[first:last] > self.index[start:stop, None]
        if self.segment_of is not None:
            apart = self.segment_of[start:stop, None] != self.segment_of[first:last]
            hidden = apart if hidden is None else hidden | apart
        if self.mask is not None:
            padding = ~self.mask[:, None, None, first:last]
            hidden = padding if hidden is None else hidden | padding
        return hidden


def is_plain_causal(
    attention_mask: AttentionMask, real: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, ""]:
    """Tell whether a mask has real queries see all real keys up to their own position, and no more.

    There may be more keys than queries, which nobody may see.

    Example:
        >>> mask = torch.ones(1, 1, 3, 4, dtype=torch.bool).tril()
        >>> is_plain_causal(mask, torch.ones(1, 3, dtype=torch.bool))
        tensor(True)
    """
    queries, keys = attention_mask.shape[-2:]
    index = torch.arange(keys, device=attention_mask.device)
    of_keys = torch.nn.functional.pad(real, (0, keys - queries))[:, None, None]
    plain = torch.ones((), dtype=torch.bool, device=attention_mask.device)
    for start, stop in _chunks(queries, len(real) * keys, attention_mask.device):
        seen = (index <= index[start:stop, None]) & of_keys
        agrees = lets_see(attention_mask[..., start:stop, :], seen)
        plain &= (agrees | ~real[:, None, start:stop, None]).all()
    return plain


def lets_see(attention_mask: Tensor, seen: Bool[Tensor, "*#shape"]) -> Bool[Tensor, "*shape"]:
    """Tell of each entry whether a mask shows what is to be seen, as it is, and hides the others.

    Example:
        >>> lets_see(torch.tensor([0.0, -torch.inf, 0.5]), torch.tensor([True, False, True]))
        tensor([ True,  True, False])
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask == seen
    lowest = torch.finfo(attention_mask.dtype).min
    return torch.where(seen, attention_mask == 0, attention_mask <= lowest)


@full_precision()
def attention_sums(
    attention: Float[Tensor, "batch query key"], masks: Bool[Tensor, "batch modality pos"]
) -> Float[Tensor, "batch direction modality pos"]:
    """Weight that each position has in attn_k (direction 0) and attn_q (direction 1).

    With A the attention restricted to a modality's tokens on both axes, attn_k sums
    `softmax_query(A)^T X` over keys and attn_q sums `softmax_key(A) X` over queries. Both are
    `weights . X`, with the row sums of `softmax_query(A)` and the column sums of
    `softmax_key(A)`: this function. Weights outside a modality are 0.

    Example:
        >>> masks = torch.tensor([[[True, True, False]]])
        >>> attention_sums(torch.zeros(1, 3, 3), masks)[0, :, 0]
        tensor([[1., 1., 0.],
                [1., 1., 0.]])
    """
    # Attention lies in [0, 1], so exp cannot overflow and one exp serves every modality.
    e = attention.detach().float().exp()
    inside = masks.float()
    over_query = (inside @ e).clamp(min=1)  # at least 1 wherever a modality has a token
    over_key = (inside @ e.mT).clamp(min=1)
    attn_k = (inside / over_query) @ e.mT
    attn_q = (inside / over_key) @ e
    return torch.stack([attn_k, attn_q], 1) * inside[:, None]


@full_precision()
def fused_attention_sums(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head pos d_head"],
    masks: Bool[Tensor, "batch modality pos"],
    causal: bool = False,
    mask: Bool[Tensor, "batch pos"] | None = None,
    segments: Segments | None = None,
    scale: float | None = None,
    attention_mask: AttentionMask | None = None,
) -> Float[Tensor, "batch direction modality pos"]:
    """What `attention_sums` makes of `head_mean_attention`, from queries and keys alone.

    The pattern is computed in chunks of rows. Chunks are kept while they fit into a fixed budget
    (the whole pattern of 4,096 positions on a CPU) and computed a second time beyond it, so memory
    does not grow with the square of the prompt.

    Args:
        q: Queries after rotary embedding.
        k: Keys after rotary embedding; with grouped-query attention they have fewer heads.
        masks: Which positions belong to which modality.
        causal: Whether a query sees only the keys up to its own position.
        mask: True at real tokens; padding keys get no weight.
        segments: Which positions attend to each other; default all.
        scale: What QK^T is multiplied by; default 1 / sqrt(d_head).
        attention_mask: What the model's own attention was given; then `mask` hides no key.

    Raises:
        ValueError: As `head_mean_attention`.

    Example:
        >>> q = k = torch.zeros(1, 2, 3, 4)
        >>> masks = torch.tensor([[[True, True, False]]])
        >>> fused_attention_sums(q, k, masks)[0, :, 0]
        tensor([[1., 1., 0.],
                [1., 1., 0.]])
    """
    pattern = _Pattern(q, k, causal, mask, segments, scale, attention_mask)
    inside = masks.float()
    over_query = torch.zeros_like(inside)
    attn_k, attn_q = torch.zeros_like(inside), torch.zeros_like(inside)
    budget = _KEPT_ON_CPU if q.is_cpu else _KEPT_ON_ACCELERATOR
    kept: list[Tensor] = []
    # Attention lies in [0, 1], so exp cannot overflow and one exp serves every modality.
    for start, stop in pattern.chunks():
        e = pattern.rows(start, stop).exp_()
        here = inside[:, :, start:stop]
        over_query += here @ e
        over_key = (inside @ e.mT).clamp(min=1)  # at least 1 wherever a modality has a token
        attn_q += (here / over_key) @ e
        budget -= e.numel()
        if budget >= 0:
            kept.append(e)
    shares = inside / over_query.clamp(min=1)
    for index, (start, stop) in enumerate(pattern.chunks()):
        e = kept[index] if index < len(kept) else pattern.rows(start, stop).exp_()
        attn_k[:, :, start:stop] = shares @ e.mT
    return torch.stack([attn_k, attn_q], 1) * inside[:, None]


@full_precision()
def received_attention(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head pos d_head"],
    causal: bool = True,
    mask: Bool[Tensor, "batch pos"] | None = None,
    segments: Segments | None = None,
    scale: float | None = None,
    attention_mask: AttentionMask | None = None,
) -> Float[Tensor, "batch pos"]:
    """The attention that each position receives: the sums of the head-mean pattern's columns.

    They are sums over all real queries, of whatever modality, in fp32. The pattern is computed in
    chunks of rows and not kept. Padding receives none.

    Args:
        q: Queries after rotary embedding.
        k: Keys after rotary embedding; with grouped-query attention they have fewer heads.
        causal: Whether a query sees only the keys up to its own position, as in a decoder.
        mask: True at real tokens.
        segments: Which positions attend to each other; default all.
        scale: What QK^T is multiplied by; default 1 / sqrt(d_head).
        attention_mask: What the model's own attention was given; then `mask` hides no key.

    Raises:
        ValueError: As `head_mean_attention`.

    Example:
        >>> q = k = torch.zeros(1, 2, 3, 4)
        >>> received_attention(q, k)
        tensor([[1.8333, 0.8333, 0.3333]])
    """
    pattern = _Pattern(q, k, causal, mask, segments, scale, attention_mask)
    real = q.new_ones(pattern.batch, pattern.pos, dtype=torch.float32)
    if mask is not None:
        real = mask.float()
    received = torch.zeros_like(real)
    for start, stop in pattern.chunks():
        received += (real[:, None, start:stop] @ pattern.rows(start, stop))[:, 0]
    return received * real


@full_precision()
def largest_attention(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head pos d_head"],
    masks: Bool[Tensor, "batch modality pos"],
    causal: bool = False,
    mask: Bool[Tensor, "batch pos"] | None = None,
    segments: Segments | None = None,
    scale: float | None = None,
    attention_mask: AttentionMask | None = None,
) -> Float[Tensor, "batch modality"]:
    """The largest head-mean attention of a modality's token to one of the same modality.

    0 where the modality has no token. Arguments and errors are those of `fused_attention_sums`.

    Example:
        >>> q = k = torch.zeros(1, 2, 4, 4)
        >>> largest_attention(q, k, torch.ones(1, 1, 4, dtype=torch.bool))
        tensor([[0.2500]])
    """
    pattern = _Pattern(q, k, causal, mask, segments, scale, attention_mask)
    largest = q.new_zeros(masks.shape[:2], dtype=torch.float32)
    for start, stop in pattern.chunks():
        rows = pattern.rows(start, stop)
        for modality, own in enumerate(masks.unbind(1)):
            here = torch.where(own[:, None], rows, 0.0).amax(-1)
            here = torch.where(own[:, start:stop], here, 0.0).amax(-1)
            largest[:, modality] = torch.maximum(largest[:, modality], here)
    return largest


@full_precision()
def attended_weights(
    received: Float[Tensor, "batch pos"], masks: Bool[Tensor, "batch modality pos"]
) -> Float[Tensor, "batch 1 modality pos"]:
    """Weight that each position has in `attended`: its share of what its modality receives.

    Example:
        >>> masks = torch.tensor([[[True, True, False]]])
        >>> attended_weights(torch.tensor([[3.0, 1.0, 4.0]]), masks)
        tensor([[[[0.7500, 0.2500, 0.0000]]]])
    """
    inside = masks.float() * received.detach().float()[:, None]
    least = torch.finfo(torch.float32).tiny
    return (inside / inside.sum(-1, keepdim=True).clamp(min=least))[:, None]


@full_precision()
def statistics(
    x: Float[Tensor, "batch pos neuron"],
    sums: Float[Tensor, "batch direction modality pos"],
    masks: Bool[Tensor, "batch modality pos"],
    parts: Sequence[tuple[int, ...]] | None = None,
) -> Float[Tensor, "batch metric modality neuron"]:
    """Metrics before normalisation in one pass over `x`: prob, mean, max, and `sums . x` for each.

    With what `attention_sums` returns they are MINER's five, in the order of `METRICS`; without any
    direction prob, mean and max alone.

    Modalities may overlap. One that has no token scores 0. NaN or inf in `x` shows as NaN or
    inf in the mean, max and attention metrics; a NaN counts as not positive in prob.

    Args:
        x: Output of the MLP's activation function, any float type.
        sums: What `attention_sums`, `fused_attention_sums` or `attended_weights` returns, or
            several of them along the axis direction, or none.
        masks: Which positions belong to which modality.
        parts: For each modality, those that it is made of without overlap, or itself alone:
            prob, mean and max of `special_text` follow from those of `text` and `special`.

    Example:
        >>> x = torch.tensor([[[1.0, -2.0], [3.0, -4.0]]])
        >>> masks = torch.tensor([[[True, True]]])
        >>> statistics(x, torch.ones(1, 2, 1, 2), masks)[0, :, 0]
        tensor([[ 1.,  0.],
                [ 2., -3.],
                [ 3., -2.],
                [ 4., -6.],
                [ 4., -6.]])
    """
    x = x.detach()
    batch, pos, neurons = x.shape
    modalities = masks.shape[1]
    if parts is None:
        parts = [(modality,) for modality in range(modalities)]
    places = {part: place for place, part in enumerate(sorted({p for own in parts for p in own}))}
    base = torch.stack([masks[:, part] for part in places], 1)
    inside = base.float()
    weights = torch.cat([inside, sums.flatten(1, 2)], 1)
    products = inside.new_zeros(batch, weights.shape[1], neurons)
    counts = inside.new_zeros(batch, len(places), neurons)
    peaks = x.new_full((batch, len(places), neurons), -torch.inf)
    positive = inside.new_empty(0)
    for start, stop in _chunks(pos, batch * neurons, x.device):
        chunk = x[:, start:stop]
        if positive.shape != chunk.shape:
            positive = inside.new_empty(chunk.shape)
        torch.gt(chunk, 0, out=positive)
        counts.baddbmm_(inside[:, :, start:stop], positive)
        products.baddbmm_(weights[:, :, start:stop], chunk.float())
        peaks = torch.maximum(peaks, maxima(chunk, base[:, :, start:stop], x.is_cpu))
    sections = [len(places), *[modalities] * sums.shape[1]]
    total, *weighted = torch.split(products, sections, 1)

    def whole(values: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        joined = [reduce(join, [values[:, places[part]] for part in own]) for own in parts]
        return torch.stack(joined, 1)

    sizes = masks.sum(-1)[:, None, :, None]
    tokens = sizes[:, 0].clamp(min=1)
    prob, mean = (whole(values, torch.add) / tokens for values in (counts, total))
    highest = whole(peaks, torch.maximum).float()
    raw = torch.stack([prob, mean, highest, *weighted], 1)
    return torch.where(sizes > 0, raw, 0.0)


def normalise(
    raw: Float[Tensor, "batch metric modality neuron"], masks: Bool[Tensor, "batch modality pos"]
) -> Float[Tensor, "batch metric modality neuron"]:
    """Min-max over the neurons of a layer, for each metric and modality apart.

    Where all neurons are equal the published code divides 0 by 0 and gives NaN; here they
    score 0, as does a modality without tokens. NaN or inf in `raw` leaves NaN in its row, so
    that a caller sees bad activations by looking for NaN.

    Example:
        >>> raw = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 1, 3)
        >>> normalise(raw, torch.tensor([[[True]]])).flatten()
        tensor([0.0000, 0.2500, 1.0000])
    """
    low, high = raw.amin(-1, keepdim=True), raw.amax(-1, keepdim=True)
    present = masks.any(-1)[:, None, :, None]
    return torch.where(present & (low != high), (raw - low) / (high - low), 0.0)


def importance(
    x: Float[Tensor, "batch pos neuron"],
    attention: Float[Tensor, "batch query key"],
    masks: Bool[Tensor, "batch modality pos"],
) -> Float[Tensor, "batch metric modality neuron"]:
    """Importance of every neuron of one layer to every modality (MINER, stage 2), in [0, 1].

    Args:
        x: Output of the MLP's activation function, before the product with the up projection.
        attention: What `head_mean_attention` returns for the same layer.
        masks: Which positions belong to which modality; padding belongs to none.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0, 3.0], [2.0, -1.0, 0.0]]])
        >>> importance(x, torch.eye(2)[None], torch.ones(1, 1, 2, dtype=torch.bool))[0, 1, 0]
        tensor([1., 0., 1.])
    """
    return normalise(statistics(x, attention_sums(attention, masks), masks), masks)


def _chunks(length: int, width: int, device: torch.device) -> Iterable[tuple[int, int]]:
    """Row ranges of a `[length, width]` array: in cache on a CPU, few and large on a GPU."""
    rows = max(1, (2**19 if device.type == "cpu" else 2**25) // width)
    return ((start, min(start + rows, length)) for start in range(0, length, rows))


def maxima(
    x: Float[Tensor, "batch pos neuron"],
    masks: Bool[Tensor, "batch modality pos"],
    by_stretch: bool,
) -> Float[Tensor, "batch modality neuron"]:
    """Maximum over each modality's positions, -inf where it has none.

    A modality is a few unbroken stretches of positions. On a CPU, where they can be looked up
    without waiting for a device, each is reduced once however many modalities share it.
    """
    if not by_stretch:
        modalities = [torch.where(m[..., None], x, -torch.inf).amax(1) for m in masks.unbind(1)]
        return torch.stack(modalities, 1)
    peaks = x.new_full((x.shape[0], masks.shape[1], x.shape[2]), -torch.inf)
    changes = (masks[..., 1:] != masks[..., :-1]).flatten(0, 1).any(0).nonzero()[:, 0] + 1
    bounds = [0, *changes.tolist(), x.shape[1]]
    for start, stop in pairwise(bounds):
        peak = x[:, None, start:stop].amax(2)
        peaks = torch.maximum(peaks, torch.where(masks[..., start, None], peak, -torch.inf))
    return peaks
