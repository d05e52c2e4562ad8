"""What the metrics attn_k, attn_q and attended weigh tokens by, in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from miner_lens.models import sites
from miner_lens.models.attention import rotated_points, scale_of, unreadable
from miner_lens.running.batch import Batch, TowerBatch
from miner_lens.running.hooks import OUTSIDE, Hook, Running
from miner_lens.scoring import kernels

NO_ROTATED = (
    "This model's queries and keys after RoPE cannot be read: {why}. Without attention metrics "
    'nothing of them is read: metrics=("prob", "mean", "max").'
)
SILENT = NO_ROTATED.format(
    why="its attention fires no hook_rot_q and hook_rot_k, for which its TransformerLens adapter "
    "needs maintain_native_attention=True and the model transformers' attention interface"
)


@dataclass(frozen=True)
class AttentionSums:
    """Reads queries and keys of one site; analyzers that need their sums share it.

    Attributes:
        site: `"llm"` or a tower.
        causal: Whether the pattern is the causal one, in the decoder.
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
            else:
                query, key = rotated_points(model, layer)
                hooks.append((query, partial(self._see_query, layer, running)))
                attention = model.blocks[layer].attn
                hooks.append((key, partial(self._see_key, layer, attention, running)))
        return hooks

    def weights(self, query: Tensor, key: Tensor, masks: Tensor, **options: Any) -> Tensor:
        """What tokens weigh, [batch direction modality pos], by a layer's queries and keys."""
        return kernels.fused_attention_sums(query, key, masks, causal=self.causal, **options)

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
            self.kept(batch)["query"] = _heads_first(query, hook)

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
        padding = batch.padding
        sums = self.weights(
            query,
            _heads_first(key, hook),
            batch.stacked.to(key.device),
            mask=None if padding is None else padding.to(key.device),
            scale=scale_of(attention),
        )
        kept[layer] = sums

    def _see_part(
        self, layer: int, part: int, attention: Any, running: Running, x: Tensor, hook: Any
    ) -> None:
        """A hook on a tower's queries (part 0) or keys (part 1), [item row head d_head]."""
        batch = running()
        if batch is None:
            raise RuntimeError(OUTSIDE.format(tower=self.site))
        seen = self.kept(batch).setdefault(("seen", layer), ([], [], attention))
        seen[part].append(x.detach())


@dataclass(frozen=True)
class ReceivedAttention(AttentionSums):
    """Reads the attention that each token receives in the pattern that the model has.

    Attributes:
        site: `"llm"` or a tower.
        causal: Whether the site's own pattern is causal.
    """

    causal: bool = True

    def weights(
        self, query: Tensor, key: Tensor, masks: Tensor, **options: Any
    ) -> Float[Tensor, "batch 1 modality pos"]:
        """Shares of what each modality's tokens receive."""
        received = kernels.received_attention(query, key, causal=self.causal, **options)
        return kernels.attended_weights(received, masks)


@dataclass(frozen=True)
class LargestAttention(AttentionSums):
    """Reads the largest attention within each modality, of which no weights are made."""

    by_token: ClassVar[bool] = False

    def weights(
        self, query: Tensor, key: Tensor, masks: Tensor, **options: Any
    ) -> Float[Tensor, "batch modality"]:
        """The largest probability in each modality's P[S, S]."""
        return kernels.largest_attention(query, key, masks, causal=self.causal, **options)


def _heads_first(x: Tensor, hook: Any) -> Tensor:
    """[batch head pos d_head]; TransformerLens hands out [batch pos head d_head] at most points."""
    return x.detach() if getattr(hook, "pos_dim", 1) == 2 else x.detach().transpose(1, 2)


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
