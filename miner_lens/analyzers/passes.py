"""What the importance analyzer sees of one forward pass, layer by layer, summed over samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from miner_lens.models.modality import Masks, parts_of
from miner_lens.models.sites import Decoder, Rotary, Tower
from miner_lens.running.protocol import Hook
from miner_lens.scoring import kernels

NO_ROTATED = (
    "This model's attention fires no hook_rot_q and hook_rot_k, so its queries and keys after RoPE "
    "cannot be read. Its TransformerLens adapter needs maintain_native_attention=True, and its "
    "attention implementation must be sdpa or eager."
)
OUTSIDE = (
    "The {tower} tower ran outside of a forward pass of the whole model, as it does within "
    "generate, so its rows cannot be told apart by sample. Call the model on the prompt instead."
)
MEAN = kernels.METRICS.index("mean")


class Pass(ABC):
    """One forward pass.

    The analyzer looks at `finite` before the sums are used, so that one bad sample spoils only a
    pass that is then repeated without it.

    Attributes:
        modalities: Names of the modality axis.
        scores: By layer, sums over samples of normalised scores.
        means: By layer, sums over samples of mean activations.
        finite: By layer, which samples' activations are finite.
        decoding: Whether this was a step of generation, of which nothing is scored.
    """

    modalities: tuple[str, ...]

    def __init__(self) -> None:
        self.scores: list[Float[Tensor, "metric modality neuron"]] = []
        self.means: list[Float[Tensor, "modality neuron"]] = []
        self.finite: list[Bool[Tensor, " batch"]] = []
        self.decoding = False

    @abstractmethod
    def hooks(self, layers: int) -> list[Hook]:
        """Hook functions by hook-point name."""

    @abstractmethod
    def present(self) -> list[int]:
        """In how many samples each modality occurs."""


class PromptPass(Pass):
    """The decoder's neurons at every token of the prompt."""

    def __init__(self, masks: Masks, real: Bool[Tensor, "batch pos"], causal: bool) -> None:
        self.causal = causal
        self.begin(masks, real)

    def begin(self, masks: Masks, real: Bool[Tensor, "batch pos"]) -> None:
        """Start over with another batch."""
        super().__init__()
        self.modalities = tuple(masks)
        self.masks = torch.stack(list(masks.values()), dim=1) if masks else torch.empty(0)
        self.parts = parts_of(masks)
        # Where nothing is padded there is nothing to mask. Asked once a pass, not in every layer.
        self.padding = None if bool(real.all()) else real
        self._query: Tensor | None = None
        self._sums: Tensor | None = None

    def hooks(self, layers: int) -> list[Hook]:
        """Hooks on queries and keys after RoPE and on X of every layer."""
        hooks: list[Hook] = []
        for layer in range(layers):
            query, key = Decoder().rotated_points(layer)
            hooks.append((query, self._see_query))
            hooks.append((key, self._see_key))
            hooks.append((Decoder().activation_point(layer), self._see_activation))
        return hooks

    def present(self) -> list[int]:
        """In how many samples each modality has a token."""
        present: list[int] = self.masks.any(dim=2).sum(dim=0).tolist()
        return present

    def _see_query(self, query: Tensor, hook: Any) -> None:
        self._query = query

    def _see_key(self, key: Tensor, hook: Any) -> None:
        # TransformerLens hands out [batch pos head d_head].
        if self._query is None:
            raise RuntimeError(NO_ROTATED)
        if self._query.shape[1] != key.shape[1]:
            # A step of generation, whose keys are mostly the prompt's: only prefill is scored.
            self.decoding = True
            self._query = None
            return
        self._sums = kernels.fused_attention_sums(
            self._query.transpose(1, 2),
            key.transpose(1, 2),
            self.masks.to(key.device),
            causal=self.causal,
            mask=None if self.padding is None else self.padding.to(key.device),
        )
        self._query = None

    def _see_activation(self, x: Tensor, hook: Any) -> None:
        if self.decoding:
            return
        if self._sums is None:
            raise RuntimeError(NO_ROTATED)
        masks = self.masks.to(x.device)
        raw = kernels.statistics(x, self._sums.to(x.device), masks, self.parts)
        self._sums = None
        scores = kernels.normalise(raw, masks)
        self.finite.append(scores.isfinite().all(dim=(1, 2, 3)))
        self.scores.append(scores.sum(0))
        self.means.append(raw[:, MEAN].sum(0))


@dataclass(frozen=True)
class _Own:
    """A sample's rows in a call of a tower."""

    sample: int
    rows: slice
    masks: Bool[Tensor, "batch modality pos"]
    segments: kernels.Segments


@dataclass(frozen=True)
class _Here:
    """What is known of a call's rows, on the device where its first layer computes."""

    rotary: Rotary | None
    samples: list[_Own]


class TowerPass(Pass):
    """A tower's neurons at every patch or frame of a sample's media.

    A tower may be called once for each modality, each time with the items of all samples in one
    row; a sample's items are scored together.
    """

    def __init__(self, tower: Tower, hf_model: Any) -> None:
        self.tower = tower
        self.hf_model = hf_model
        self.modalities = tower.modalities
        self._layers = 0
        self.begin(None, 0)

    def begin(self, inputs: Mapping[str, Any] | None, samples: int) -> None:
        """Start over with another batch, or with none (None)."""
        super().__init__()
        self.inputs = inputs or {}
        self.samples = samples
        self.calls = [] if inputs is None else self.tower.calls(self.hf_model, inputs)
        self._seen: list[Tensor] = []
        self._sums: list[Tensor] | None = None
        self._spans = [call.spans() for call in self.calls]
        self._here: tuple[int, _Here] | None = None

    def hooks(self, layers: int) -> list[Hook]:
        """Hooks on what queries and keys are made of, and on X of every layer."""
        self._layers = layers
        hooks: list[Hook] = []
        for layer in range(layers):
            points = self.tower.attention_points(layer)
            for point in points:
                hooks.append((point, self._see_attention(len(points))))
            hooks.append((self.tower.activation_point(layer), self._see_activation))
        return hooks

    def present(self) -> list[int]:
        """How many samples have items of each modality."""
        counts = {
            call.modality: len(spans) for call, spans in zip(self.calls, self._spans, strict=True)
        }
        return [counts.get(modality, 0) for modality in self.modalities]

    def finish(self) -> None:
        """Put the calls' sums together, one modality beside the other, layer by layer."""
        parts = len(self.calls) * self._layers
        if len(self.scores) != parts:
            raise RuntimeError(
                f"The {self.tower.name} tower should have run {len(self.calls)} times through "
                f"{self._layers} layers, but {len(self.scores)} layers were seen."
            )
        scores, means, finite = self.scores, self.means, self.finite
        self.scores, self.means, self.finite = [], [], []
        neurons = [mlp.before.out_features for mlp in self.tower.mlps(self.hf_model)]
        for layer, width in enumerate(neurons):
            here = range(layer, parts, self._layers)
            device = scores[layer].device if parts else None
            all_scores = torch.zeros(
                len(kernels.METRICS), len(self.modalities), width, device=device
            )
            all_means = torch.zeros(len(self.modalities), width, device=device)
            good = torch.ones(self.samples, dtype=torch.bool, device=device)
            for call, index in zip(self.calls, here, strict=True):
                place = self.modalities.index(call.modality)
                all_scores[:, place] = scores[index][:, 0]
                all_means[place] = means[index][0]
                good &= finite[index]
            self.scores.append(all_scores)
            self.means.append(all_means)
            self.finite.append(good)

    def _now(self) -> int:
        """The call that is running."""
        call = len(self.scores) // max(1, self._layers)
        if call >= len(self.calls):
            raise RuntimeError(OUTSIDE.format(tower=self.tower.name))
        return call

    def _on(self, device: torch.device) -> _Here:
        """What is known of the running call's rows, brought to a device once, not in each layer."""
        call = self._now()
        if self._here is None or self._here[0] != call:
            self._here = call, self._bring(call, device)
        return self._here[1]

    def _bring(self, call: int, device: torch.device) -> _Here:
        modality, rows = self.calls[call].modality, self.calls[call].rows
        real = rows.real.to(device)[None, None]
        own = []
        for sample, start, stop in self._spans[call]:
            segments = kernels.Segments.of(rows.segments[start:stop], device)
            own.append(_Own(sample, slice(start, stop), real[..., start:stop], segments))
        return _Here(self.tower.rotary(self.hf_model, self.inputs, modality, device), own)

    def _see_attention(self, points: int) -> Any:
        def see(tensor: Tensor, hook: Any) -> None:
            here = self._on(tensor.device)
            self._seen.append(tensor)
            if len(self._seen) < points:
                return
            query, key = self.tower.queries_and_keys(self.hf_model, tuple(self._seen), here.rotary)
            self._seen = []
            self._sums = [
                kernels.fused_attention_sums(
                    query[own.rows].transpose(0, 1)[None],
                    key[own.rows].transpose(0, 1)[None],
                    own.masks.to(query.device),
                    segments=own.segments,
                )
                for own in here.samples
            ]

        return see

    def _see_activation(self, x: Tensor, hook: Any) -> None:
        here = self._on(x.device)
        x = x.flatten(0, -2)
        finite = torch.ones(self.samples, dtype=torch.bool, device=x.device)
        scores = torch.zeros(len(kernels.METRICS), 1, x.shape[-1], device=x.device)
        means = torch.zeros(1, x.shape[-1], device=x.device)
        for index, own in enumerate(here.samples):
            masks = own.masks.to(x.device)
            none = torch.zeros(1, 2, *masks.shape[1:], device=x.device)
            sums = none if self._sums is None else self._sums[index].to(x.device)
            raw = kernels.statistics(x[None, own.rows], sums, masks)
            normal = kernels.normalise(raw, masks)
            finite[own.sample] = normal.isfinite().all()
            scores += normal[0]
            means += raw[0, MEAN]
        self._sums = None
        self.scores.append(scores)
        self.means.append(means)
        self.finite.append(finite)
