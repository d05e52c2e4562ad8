"""Attention times gradient: what the last token takes from each modality, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import einsum
from torch import Tensor

from miner_lens.models.modality import UNIONS
from miner_lens.models.points import Point, pattern_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring.sample_curves import SampleCurves

KEPT_SAMPLES = 10_000
EFFECT, SALIENCY = "effect", "saliency"


@dataclass(frozen=True, eq=False, repr=False)
class AttentionFlow(SampleCurves):
    """What the last token takes from each modality by attention, to first order, by layer.

    Attributes:
        values: `effect`, what the answer's log-probability would lose, in nats, if the last token
            did not attend to the modality in this layer: above 0 where that helps the answer.
            `saliency`, the same with the amount of each token's effect instead of its sign.
        counts: How many tokens of the modality each sample has.
        modalities: Names of the third axis.
        identity: The model.
    """

    filename: ClassVar[str] = "attention-flow.safetensors"

    measures = (EFFECT, SALIENCY)

    def __repr__(self) -> str:
        samples, layers = self.values.shape[:2]
        lines = [f"AttentionFlow({samples} samples, {layers} layers; mean effect in nats)"]
        for modality in self.known():
            row = self.of(modality, EFFECT).mean(0).tolist()
            lines.append(f"{modality:<12}" + "".join(f" {value:7.3f}" for value in row))
        return "\n".join(lines)


class AttentionFlowAnalyzer(Analyzer[AttentionFlow]):
    """Sums attention times its gradient from each modality's tokens to the last token.

    Of each layer, the sum over heads and over a modality's tokens of the attention that the last
    token pays them times the gradient of the objective (by default the answer's log-probability)
    with respect to it: to first order, what the objective loses when this attention is taken away
    and nothing is put in its place. `saliency` takes, of each token, the absolute value of the sum
    over heads, as Wang et al. 2023 (arXiv 2305.14160, eq. 1). `ml.information_flow` cuts for real,
    where the softmax gives the rest of the tokens what was taken away.

    The answer's own tokens, which the model reads behind the prompt, count as last tokens. What a
    token pays itself does not count, as it cannot be cut. The layers compute their patterns, and
    keep them for the backward pass: [sample head query key] in every layer.

    Example:
        flow = ml.run(model, data, ml.AttentionFlowAnalyzer())
        flow.curves()
    """

    needs_gradients = True

    def points(self, model: Any) -> Sequence[Point]:
        """The attention pattern of each layer.

        Raises:
            ValueError: A layer has no pattern that can be read.
        """
        points, there = pattern_points(model), model.hook_dict
        if lacking := [point.layer for point in points if point.name not in there]:
            raise ValueError(
                f"Layer {lacking[0]} of this model has no attention pattern that can be read, so "
                "what flows through it is not known. `ml.information_flow` needs none."
            )
        return points

    def see(  # type: ignore[override]
        self, x: Tensor, point: Point, batch: Batch, gradient: Tensor
    ) -> None:
        """Sum a layer's effects over heads and tokens."""
        layers: dict[int, Tensor] = batch.once(("attention flow", id(self)), dict)
        names = self._names(batch)
        queries, keys = batch.once(("attention flow edges", x.device), lambda: _edges(batch, x))
        tail = queries.shape[1]
        tokens = einsum(
            x[:, :, -tail:].float(),
            gradient[:, :, -tail:].float(),
            "sample head query key, sample head query key -> sample query key",
        )
        tokens = tokens * queries[..., None] * keys
        masks = torch.stack([batch.masks[name].to(x.device) for name in names], 1).float()
        layers[point.layer] = torch.stack(
            [
                einsum(one, masks, "sample query key, sample modality key -> sample modality")
                for one in (tokens, tokens.abs())
            ],
            -1,
        )

    def finish(self, batch: Batch) -> None:
        """Keep what all layers have given."""
        layers: dict[int, Tensor] = batch.once(("attention flow", id(self)), dict)
        device = layers[0].device
        values = torch.stack([layers[layer].to(device) for layer in sorted(layers)], 1)
        counts = torch.stack([batch.masks[name].sum(1) for name in self._names(batch)], 1)
        self.keep("values", values, KEPT_SAMPLES)
        self.keep("counts", counts, KEPT_SAMPLES)

    def result(self) -> AttentionFlow:
        """The effects in each sample.

        Raises:
            ValueError: No sample has been seen.
        """
        if self.samples == 0:
            raise ValueError("No sample has been seen, so nothing has flowed.")
        names = tuple(name for name in self.occurrences if name not in UNIONS)
        counts = self["counts"].cpu()
        return AttentionFlow(self["values"].cpu(), counts, names, identity=self.identity)

    def _names(self, batch: Batch) -> list[str]:
        return [name for name in batch.masks if name not in UNIONS]


def _edges(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the last positions are last tokens, and which keys each may be cut off from."""
    length = x.shape[-1]
    at = torch.arange(length, device=x.device)
    last = (batch.real.to(x.device) * at).amax(1, keepdim=True)
    answers = torch.tensor(list(batch.tails) or [0], device=x.device)
    tail = length - int(last.min())
    queries = ((at >= last) & (at <= last + answers[:, None]))[:, -tail:].float()
    itself = at[-tail:, None] == at
    return queries, (~itself).float()[None]
