"""What the metrics attn_k, attn_q and attended weigh tokens by, in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from miner_lens.models import sites
from miner_lens.models.attention import scale_of
from miner_lens.running.batch import Batch, TowerBatch, TowerPass
from miner_lens.running.hooks import OUTSIDE, Hook, Running
from miner_lens.scoring import kernels

NO_ROTATED = (
    "This model's attention fires no hook_rot_q and hook_rot_k, so its queries and keys after RoPE "
    "cannot be read. Its TransformerLens adapter needs maintain_native_attention=True, and its "
    "attention implementation must be sdpa or eager. Without attention metrics nothing of it is "
    'read: metrics=("prob", "mean", "max").'
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

    def hooks(self, model: Any, running: Running) -> list[Hook]:
        """Hooks on queries and keys, or on what they are made of."""
        hf_model = model.original_model
        site = sites.find(hf_model, self.site)
        layers = range(len(site.mlps(hf_model)))
        hooks: list[Hook] = []
        for layer in layers:
            if isinstance(site, sites.Tower):
                points: tuple[str, ...] = site.attention_points(layer)
                reader = _TowerLayer(self, site, hf_model, layer, len(points), running)
                hooks += [(point, reader.see) for point in points]
            else:
                query, key = sites.Decoder().rotated_points(layer)
                hooks.append((query, partial(self._see_query, layer, running)))
                scale = scale_of(model.blocks[layer].attn)
                hooks.append((key, partial(self._see_key, layer, scale, running)))
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
            raise RuntimeError(NO_ROTATED)
        return sums

    def of_call(self, batch: TowerBatch, layer: int) -> list[Tensor] | None:
        """A layer's sums in a call of a tower, for each of its spans; None without attention."""
        sums: list[Tensor] | None = self.kept(batch.whole).get((layer, batch.call))
        return sums

    def kept(self, batch: Batch) -> dict[Any, Any]:
        """What has been read in this pass."""
        return batch.once(self, dict)

    def _see_query(self, layer: int, running: Running, query: Tensor, hook: Any) -> None:
        if (batch := running()) is not None:
            self.kept(batch)["query"] = query.detach()

    def _see_key(
        self, layer: int, scale: float | None, running: Running, key: Tensor, hook: Any
    ) -> None:
        batch = running()
        if batch is None:
            return
        kept = self.kept(batch)
        query = kept.pop("query", None)
        if query is None:
            raise RuntimeError(NO_ROTATED)
        padding = batch.padding
        # TransformerLens hands out [batch pos head d_head].
        sums = self.weights(
            query.transpose(1, 2),
            key.detach().transpose(1, 2),
            batch.stacked.to(key.device),
            mask=None if padding is None else padding.to(key.device),
            scale=scale,
        )
        kept[layer] = sums


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

    def weights(
        self, query: Tensor, key: Tensor, masks: Tensor, **options: Any
    ) -> Float[Tensor, "batch modality"]:
        """The largest probability in each modality's P[S, S]."""
        return kernels.largest_attention(query, key, masks, causal=self.causal, **options)


class _TowerLayer:
    """Reads one layer of a tower."""

    def __init__(
        self,
        shared: AttentionSums,
        tower: sites.Tower,
        hf_model: Any,
        layer: int,
        points: int,
        running: Running,
    ) -> None:
        self._shared, self._tower, self._hf_model = shared, tower, hf_model
        self._layer, self._points, self._running = layer, points, running

    def see(self, tensor: Tensor, hook: Any) -> None:
        """A hook on each of the layer's attention points."""
        batch = self._running()
        if batch is None:
            raise RuntimeError(OUTSIDE.format(tower=self._tower.name))
        kept = self._shared.kept(batch)
        seen = kept.setdefault(("seen", self._layer), [])
        seen.append(tensor.detach())
        if len(seen) < self._points:
            return
        kept["seen", self._layer] = []
        call = kept.get(("call", self._layer), 0)
        kept["call", self._layer] = call + 1
        tower = TowerPass.of(batch, self._hf_model, self._tower.name)
        here = batch.once(
            ("rotary", self._tower.name, call), lambda: self._here(tower, call, tensor.device)
        )
        rotary, segments = here
        query, key = self._tower.queries_and_keys(self._hf_model, tuple(seen), rotary)
        spans = tower.spans[call]
        view = tower.view(call, query.device)
        kept[self._layer, call] = [
            self._shared.weights(
                query[start:stop].transpose(0, 1)[None],
                key[start:stop].transpose(0, 1)[None],
                view.stacked[sample : sample + 1, :, : stop - start],
                segments=segments[number],
            )
            for number, (sample, start, stop) in enumerate(spans)
        ]

    def _here(self, tower: TowerPass, call: int, device: torch.device) -> tuple[Any, list[Any]]:
        """What is known of a call's rows, brought to a device once, not in each layer."""
        found = tower.calls[call]
        rotary = self._tower.rotary(self._hf_model, tower.batch.inputs, found.modality, device)
        segments = [
            kernels.Segments.of(found.rows.segments[start:stop], device)
            for _, start, stop in tower.spans[call]
        ]
        return rotary, segments
