"""What the metrics attn_k, attn_q and attended weigh tokens by, in every layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from miner_lens.models import sites
from miner_lens.models.attention import (
    Call,
    call_of,
    rebuilt,
    rotated_points,
    scale_of,
    unreadable,
)
from miner_lens.running.batch import Batch, TowerBatch
from miner_lens.running.hooks import OUTSIDE, Hook, Running, require_positions
from miner_lens.scoring import kernels

T = TypeVar("T")

NO_ROTATED = (
    "This model's queries and keys after RoPE cannot be read: {why}. Without attention metrics "
    'nothing of them is read: metrics=("prob", "mean", "max").'
)
SILENT = NO_ROTATED.format(
    why="its attention fires no hook_rot_q and hook_rot_k, for which its TransformerLens adapter "
    "needs maintain_native_attention=True and the model transformers' attention interface"
)


OTHER_KEYS = (
    "Attention of layer {layer} looks at keys that are not the prompt's: it has {keys} of them for "
    "{queries} queries, as where a prefix is learned. What tokens receive is not defined by the "
    "prompt's alone. Use attention='bidirectional', and leave the metric attended out."
)


OTHER_PATTERN = (
    "Attention of layer {layer} in site {site!r} is not a softmax over all that is of the same "
    "image, video or clip: its mask or its arguments say otherwise. Leave the metric attended out, "
    "and use attention='bidirectional'."
)


@dataclass(frozen=True)
class AttentionSums:
    """Reads queries and keys of one site; analyzers that need their sums share it.

    Attributes:
        site: `"llm"` or a tower.
        causal: Whether the pattern is the one that the model has, by the mask and arguments that
            reach its attention; otherwise all tokens attend to all, in a tower all of an item's.
    """

    site: str = "llm"
    causal: bool = False
    # Whether `weights` are of each token; otherwise of a modality as a whole.
    by_token: ClassVar[bool] = True

    def hooks(self, model: Any, running: Running) -> list[Hook]:
        """Hooks on queries and keys, or on what they are made of."""
        hf_model = model.original_model
        site = sites.find(hf_model, self.site)
        layers = range(len(site.mlps(hf_model)))
        if isinstance(site, sites.Tower):
            # A projector attends to nothing, and scores 0 there.
            if self.site != "projector" and not any(map(site.attention_points, layers)):
                raise RuntimeError(SILENT)
        elif why := unreadable(model):
            raise RuntimeError(NO_ROTATED.format(why=why))
        hooks: list[Hook] = []
        for layer in layers:
            if isinstance(site, sites.Tower):
                for part, point in enumerate(site.attention_points(layer)):
                    attention = site.attentions()[layer]
                    hooks.append((point, partial(self._see_part, layer, part, attention, running)))
                continue
            attention = model.blocks[layer].attn
            if self.causal and rebuilt([attention]):
                # TransformerLens has computed it, whatever the family's own is made of.
                seen = partial(self._see_pattern, layer, running)
                hooks.append((f"blocks.{layer}.attn.hook_pattern", seen))
                continue
            query, key = rotated_points(model, layer)
            hooks.append((query, partial(self._see_query, layer, running)))
            hooks.append((key, partial(self._see_key, layer, attention, running)))
        return hooks

    def weights(self, query: Tensor, key: Tensor, masks: Tensor, **options: Any) -> Tensor:
        """What tokens weigh, [batch direction modality pos], by a layer's queries and keys."""
        return kernels.fused_attention_sums(query, key, masks, **options)

    def of_pattern(self, pattern: Float[Tensor, "batch query key"], masks: Tensor) -> Tensor:
        """What tokens weigh, by the head mean of a pattern, in which padding's rows are 0."""
        return kernels.attention_sums(pattern, masks)

    def of_layer(self, batch: Batch, layer: int) -> Tensor:
        """What `weights` made of a layer of the decoder.

        Raises:
            RuntimeError: No queries and keys were seen.
        """
        sums: Tensor | None = self.kept(batch).get(layer)
        if sums is None:
            raise RuntimeError(SILENT)
        return sums

    def of_call(self, batch: TowerBatch, layer: int) -> list[Tensor] | None:
        """A layer's sums in a call of a tower, for each of its spans; None without attention.

        To be asked when the layer's X is there, and so all of its attention has been seen.

        Raises:
            RuntimeError: The tower has attention, and no queries and keys were seen.
        """
        kept = self.kept(batch.whole)
        if (layer, batch.call) not in kept:
            seen = kept.pop(("seen", layer), None)
            if seen is None and batch.whole.towers[self.site].tower.attention_points(layer):
                raise RuntimeError(SILENT)
            kept[layer, batch.call] = None if seen is None else self._sums(batch, layer, *seen)
        sums: list[Tensor] | None = kept[layer, batch.call]
        return sums

    def _sums(
        self,
        batch: TowerBatch,
        layer: int,
        queries: list[Tensor],
        keys: list[Tensor],
        attention: Any,
        calls: list[Call | None],
    ) -> list[Tensor]:
        # Some families call attention once for each image or window, some for all items at once.
        sizes = tuple(part.shape[1] for part in queries for _ in part)
        query, key = (torch.cat([p.flatten(0, 1) for p in part]) for part in (queries, keys))
        if len(query) != len(batch.rows.items):
            raise RuntimeError(
                f"Attention of layer {layer} in site {self.site!r} has {len(query)} queries where "
                f"the MLP has {len(batch.rows.items)} rows. Score without it: "
                'metrics=("prob", "mean", "max").'
            )
        units = [part.shape[:2] for part in queries]
        if self.causal and not _within_items(calls, units, batch):
            raise RuntimeError(OTHER_PATTERN.format(layer=layer, site=self.site))
        stretches = batch.whole.once(
            ("segments", self.site, batch.call, sizes, query.device),
            lambda: _stretches(batch, sizes, query.device),
        )
        view = batch.stacked
        sums = []
        for (sample, start, stop), (real, segments) in zip(batch.spans, stretches, strict=True):
            masks = view[sample : sample + 1, :, : stop - start].to(query.device)
            q, k = query[start:stop], key[start:stop]
            if real is not None:
                q, k, masks = q[real], k[real], masks[..., real]
            found = self.weights(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                masks,
                segments=segments,
                scale=scale_of(attention),
                causal=False,
            )
            if real is not None and self.by_token:
                among = found.new_zeros(*found.shape[:-1], stop - start)
                found = among.index_copy_(-1, real, found)
            sums.append(found)
        return sums

    def kept(self, batch: Batch) -> dict[Any, Any]:
        """What has been read in this pass."""
        return batch.once(self, dict)

    def _see_query(self, layer: int, running: Running, query: Tensor, hook: Any) -> None:
        if (batch := running()) is not None:
            query = _heads_first(query, hook)
            require_positions(query, f"Attention of layer {layer}", batch, (2,))
            self.kept(batch)["query"] = query

    def _see_key(
        self, layer: int, attention: Any, running: Running, key: Tensor, hook: Any
    ) -> None:
        batch = running()
        if batch is None:
            return
        kept = self.kept(batch)
        query = kept.pop("query", None)
        if query is None:
            raise RuntimeError(SILENT)
        key = _heads_first(key, hook)
        padding = batch.padding
        options: dict[str, Any] = {
            "mask": None if padding is None else padding.to(key.device),
            "scale": scale_of(attention),
            "causal": self.causal,
        }
        call = call_of(attention) if self.causal else None
        if self.causal and call is None:
            raise RuntimeError(SILENT)
        if call is not None and call.explicit:
            call.readers.append(partial(self.keep_pattern, layer, batch))
            return
        if call is not None:
            options |= visible(call, batch, layer, query, key)
            key = key[:, :, : query.shape[2]]
        kept[layer] = self.weights(query, key, batch.stacked.to(key.device), **options)

    def _see_pattern(self, layer: int, running: Running, pattern: Tensor, hook: Any) -> None:
        if (batch := running()) is not None:
            self.keep_pattern(layer, batch, pattern.detach())

    def keep_pattern(self, layer: int, batch: Batch, pattern: Tensor) -> None:
        """Keep what `of_pattern` makes of a layer's pattern, [batch head query key].

        Raises:
            RuntimeError: Queries see keys that are not the prompt's.
        """
        queries, keys = pattern.shape[-2:]
        padding = ~batch.real.to(pattern.device)[..., None]
        # Padding may see nothing at all, of which some families make NaN.
        mean = pattern.mean(1, dtype=torch.float32).masked_fill_(padding, 0.0)
        if keys > queries and bool(mean[..., queries:].any()):
            raise RuntimeError(OTHER_KEYS.format(layer=layer, queries=queries, keys=keys))
        mean = mean[..., :queries]
        self.kept(batch)[layer] = self.of_pattern(mean, batch.stacked.to(mean.device))

    def _see_part(
        self, layer: int, part: int, attention: Any, running: Running, x: Tensor, hook: Any
    ) -> None:
        """A hook on a tower's queries (part 0) or keys (part 1), [item row head d_head]."""
        batch = running()
        if batch is None:
            raise RuntimeError(OUTSIDE.format(tower=self.site))
        seen = self.kept(batch).setdefault(("seen", layer), ([], [], attention, []))
        seen[part].append(x.detach())
        if part:
            seen[-1].append(call_of(attention))


@dataclass(frozen=True)
class ReceivedAttention(AttentionSums):
    """Reads the attention that each token receives in the pattern that the model has.

    Attributes:
        site: `"llm"` or a tower.
        causal: As there; it always is the pattern that the model has.
    """

    causal: bool = True

    def weights(
        self, query: Tensor, key: Tensor, masks: Tensor, **options: Any
    ) -> Float[Tensor, "batch 1 modality pos"]:
        """Shares of what each modality's tokens receive."""
        received = kernels.received_attention(query, key, **options)
        return kernels.attended_weights(received, masks)

    def of_pattern(
        self, pattern: Float[Tensor, "batch query key"], masks: Tensor
    ) -> Float[Tensor, "batch 1 modality pos"]:
        """Shares of what each modality's tokens receive, by the head mean of a pattern."""
        return kernels.attended_weights(pattern.sum(1), masks)


@dataclass(frozen=True)
class LargestAttention(AttentionSums):
    """Reads the largest attention within each modality, of which no weights are made."""

    by_token: ClassVar[bool] = False

    def weights(
        self, query: Tensor, key: Tensor, masks: Tensor, **options: Any
    ) -> Float[Tensor, "batch modality"]:
        """The largest probability in each modality's P[S, S]."""
        return kernels.largest_attention(query, key, masks, **options)

    def of_pattern(
        self, pattern: Float[Tensor, "batch query key"], masks: Tensor
    ) -> Float[Tensor, "batch modality"]:
        """The largest probability in each modality's P[S, S], by the head mean of a pattern."""
        within = [torch.where(m[:, :, None] & m[:, None], pattern, 0.0) for m in masks.unbind(1)]
        return torch.stack(within, 1).amax((-2, -1))


def _heads_first(x: Tensor, hook: Any) -> Tensor:
    """[batch head pos d_head]; TransformerLens hands out [batch pos head d_head] at most points."""
    return x.detach() if getattr(hook, "pos_dim", 1) == 2 else x.detach().transpose(1, 2)


def visible(call: Call, batch: Batch, layer: int, query: Tensor, key: Tensor) -> dict[str, Any]:
    """Which keys the queries of a prompt see in a call of attention, as kernels are told.

    Raises:
        RuntimeError: They see keys that are not the prompt's.
    """
    queries, keys = query.shape[2], key.shape[2]
    problem = OTHER_KEYS.format(layer=layer, queries=queries, keys=keys)
    if call.mask is None:
        if keys > queries and not call.causal:
            raise RuntimeError(problem)
        # An answer behind the prompt is no padding, but none of the prompt's queries sees it.
        if call.causal and (batch.padding is None or any(batch.tails)):
            return {"causal": True}
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
        return {"causal": call.causal, "attention_mask": everything}
    given = call.mask

    def look() -> dict[str, Any]:
        mask = given.detach().expand(_broadcast(given, 1, queries, keys))
        real = batch.real.to(mask.device)
        if bool(kernels.is_plain_causal(mask, real)):
            return {"causal": True}
        beyond = mask[..., queries:]
        hidden = kernels.lets_see(beyond, torch.zeros_like(beyond, dtype=torch.bool))
        if not bool((hidden | ~real[:, None, :, None]).all()):
            raise RuntimeError(problem)
        return {"causal": False, "attention_mask": mask[..., :queries]}

    return _of_mask(batch, given, ("visible", queries, keys), look)


def _of_mask(batch: Batch, mask: Tensor, key: Hashable, look: Callable[[], T]) -> T:
    """What has been read off a mask, which layers share: as it is, or in views of their own."""
    if mask.is_inference():
        return look()  # it does not say when it is written into
    key = (key, mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask._version)
    # Kept with what was read, so that its memory is nobody else's.
    return batch.once(key, lambda: (look(), mask))[0]


def _within_items(calls: list[Call | None], units: list[torch.Size], batch: TowerBatch) -> bool:
    """Tell whether each row attends to all real rows of its item, and to no others."""
    start = 0
    for call, (count, rows) in zip(calls, units, strict=True):
        if call is None or call.explicit or (call.mask is None and call.causal):
            return False
        if call.mask is not None:
            look = partial(_masks_items, call.mask, start, count, rows, batch)
            if not _of_mask(batch.whole, call.mask, ("items", batch.call, start), look):
                return False
        start += count * rows
    return True


def _masks_items(mask: Tensor, start: int, count: int, rows: int, batch: TowerBatch) -> bool:
    shape = _broadcast(mask, count, rows, rows)
    if shape[-2:] != (rows, rows):
        return False
    here = slice(start, start + count * rows)
    items = batch.rows.items[here].to(mask.device).view(count, rows)
    real = batch.rows.real[here].to(mask.device).view(count, rows)
    for unit, item, own in zip(mask.expand(shape), items, real, strict=True):
        agrees = kernels.lets_see(unit, (item[:, None] == item) & own)
        if not bool((agrees | ~own[:, None]).all()):
            return False
    return True


def _broadcast(mask: Tensor, batch: int, queries: int, keys: int) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(mask.shape, (batch, 1, queries, keys))  # type: ignore[no-untyped-call]
    return shape


Stretch = tuple[Int[Tensor, " real"] | None, kernels.Segments]


def _stretches(batch: TowerBatch, sizes: tuple[int, ...], device: torch.device) -> list[Stretch]:
    """Of each span: its rows that are not padding, None if all are, and which attend to which.

    Rows attend to those that attention was called with, and only within an image, video or clip.
    """
    items, real = batch.rows.items, batch.rows.real
    calls = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    numbers = calls * (int(items[-1]) + 1) + items
    found: list[Stretch] = []
    for _, start, stop in batch.spans:
        here, own = real[start:stop], numbers[start:stop]
        rows = None if bool(here.all()) else here.nonzero()[:, 0]
        segments = kernels.Segments.of(own if rows is None else own[rows], device)
        found.append((None if rows is None else rows.to(device), segments))
    return found
