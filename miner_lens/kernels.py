"""Arithmetic of stage 2: how much each neuron answers to each modality's tokens.

Pure functions on tensors: they know no model, never wait for a GPU, and take no gradient.
Positions in no mask (padding) have no part in any result, but must be finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

METRICS = ("prob", "mean", "max", "attn_k", "attn_q")


def head_mean_attention(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head pos d_head"],
    causal: bool = False,
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch query key"]:
    """Attention pattern averaged over heads, in fp32, without a `[head, query, key]` tensor.

    Args:
        q: Queries after rotary embedding.
        k: Keys after rotary embedding; with grouped-query attention they have fewer heads.
        causal: Whether a query sees only the keys up to its own position. The published
            MINER code sees all of them, hence the default.
        mask: True at real tokens. Padding keys get no weight; rows of padding queries are 0.

    Raises:
        ValueError: If the key heads do not divide the query heads, or there are not as many keys
            as queries.

    Example:
        >>> q = k = torch.zeros(1, 2, 3, 4)
        >>> head_mean_attention(q, k, causal=True)[0, 1]
        tensor([0.5000, 0.5000, 0.0000])
    """
    batch, heads, pos, d_head = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads:
        raise ValueError(
            f"q has {heads} heads and k has {kv_heads}; every key head must serve the same number "
            f"of query heads. Pass k as the model's k_proj gives it, or repeat its heads."
        )
    if k.shape[2] != pos:
        raise ValueError(
            f"q has {pos} positions and k has {k.shape[2]}. Pass a whole prompt, not a step of "
            f"generation."
        )
    group = heads // kv_heads
    q = rearrange(
        q.detach().float() * d_head**-0.5,
        "batch (kv_head group) query d_head -> kv_head batch group query d_head",
        group=group,
    )
    k = rearrange(k.detach().float(), "batch kv_head key d_head -> kv_head batch d_head key")
    never = torch.finfo(torch.float32).min  # not -inf: a row that sees nothing stays finite
    index = torch.arange(pos, device=q.device)
    attention = q.new_zeros(batch, pos, pos)
    for start, stop in _chunks(pos, batch * group * pos, q.device):
        seen = stop if causal else pos
        for queries, keys in zip(q, k, strict=True):
            rows = rearrange(
                queries[:, :, start:stop], "batch group query d_head -> batch (group query) d_head"
            )
            scores = torch.bmm(rows, keys[:, :, :seen]).view(batch, group, -1, seen)
            if causal:
                scores.masked_fill_(index[:seen] > index[start:stop, None], never)
            if mask is not None:
                scores.masked_fill_(~mask[:, None, None, :seen], never)
            attention[:, start:stop, :seen] += scores.softmax(-1).sum(1)
    attention /= heads
    return attention if mask is None else attention.masked_fill_(~mask[:, :, None], 0.0)


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


def statistics(
    x: Float[Tensor, "batch pos neuron"],
    sums: Float[Tensor, "batch direction modality pos"],
    masks: Bool[Tensor, "batch modality pos"],
) -> Float[Tensor, "batch metric modality neuron"]:
    """The five metrics before normalisation, in the order of `METRICS`, in one pass over `x`.

    Modalities may overlap. One that has no token scores 0. NaN or inf in `x` shows as NaN or
    inf in the mean, max and attention metrics; a NaN counts as not positive in prob.

    Args:
        x: Output of the MLP's activation function, any float type.
        sums: What `attention_sums` returns.
        masks: Which positions belong to which modality.

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
    inside = masks.float()
    weights = torch.cat([inside, sums.flatten(1, 2)], 1)
    products = inside.new_zeros(batch, 3 * modalities, neurons)
    counts = inside.new_zeros(batch, modalities, neurons)
    peaks = x.new_full((batch, modalities, neurons), -torch.inf)
    positive = inside.new_empty(0)
    for start, stop in _chunks(pos, batch * neurons, x.device):
        chunk = x[:, start:stop]
        if positive.shape != chunk.shape:
            positive = inside.new_empty(chunk.shape)
        torch.gt(chunk, 0, out=positive)
        counts.baddbmm_(inside[:, :, start:stop], positive)
        products.baddbmm_(weights[:, :, start:stop], chunk.float())
        peaks = torch.maximum(peaks, _maxima(chunk, masks[:, :, start:stop], x.is_cpu))
    sizes = masks.sum(-1)[:, None, :, None]
    mean, attn_k, attn_q = products.view(batch, 3, modalities, neurons).unbind(1)
    tokens = sizes[:, 0].clamp(min=1)
    raw = torch.stack([counts / tokens, mean / tokens, peaks.float(), attn_k, attn_q], 1)
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


def _chunks(length: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Row ranges of a `[length, width]` array: in cache on a CPU, few and large on a GPU."""
    rows = max(1, (2**21 if device.type == "cpu" else 2**26) // width)
    return ((start, min(start + rows, length)) for start in range(0, length, rows))


def _maxima(
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
