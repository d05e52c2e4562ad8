"""Fitting a tuned lens, and how far lenses are from what the model says in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from miner_lens.analyzers.reading import MOST_LOGITS, Lens
from miner_lens.models.access import identity
from miner_lens.models.generation import input_device
from miner_lens.models.modality import UNIONS
from miner_lens.models.points import Point, residual_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring.sample_curves import SampleCurves
from miner_lens.scoring.tuned_lens import TunedLens, fit, unit

KEPT_SAMPLES = 10_000


class TunedLensAnalyzer(Analyzer[TunedLens]):
    """Fits an affine map for each layer, from its residual stream to the last layer's.

    Belrose et al. 2023 (arXiv 2303.08112) fit such maps to the model's output by gradient descent.
    Here they are fitted by least squares to the last residual stream, each token's scaled to a root
    mean square of 1: that has one solution, of sums that do not depend on the order of the data, so
    that it is merged, continued and distributed as any other analysis. It is not the fit that makes
    the divergence least; `LensDivergenceAnalyzer` says on other data what it is worth. All of a
    prompt's tokens count the same.

    Its state is two matrices [d_model d_model] in float64 for each layer (160 MB for a model of 30
    layers of 576), and each pass holds its residual streams to its end.

    Args:
        ridge: How strongly the maps are held to the identity, which is the plain lens, as a share
            of the mean variance of a coordinate. More where data are few.

    Example:
        tuned = ml.run(model, data, ml.TunedLensAnalyzer())
        lens = ml.run(model, others, ml.LogitLensAnalyzer(tuned))
    """

    def __init__(self, ridge: float = 0.01) -> None:
        super().__init__("llm")
        if not ridge >= 0:
            raise ValueError(f"ridge must be 0 or more, not {ridge}.")
        self.ridge = ridge

    def points(self, model: Any) -> Sequence[Point]:
        """The residual stream after each layer."""
        return residual_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Hold a layer's residual stream until the last one is there."""
        _held(batch)[point.layer] = x

    def finish(self, batch: Batch) -> None:
        """Add up the products of each layer with the last."""
        held = _held(batch)
        *before, last = (held[layer] for layer in sorted(held))
        wanted = unit(last[batch.real.to(last.device)])
        for layer, x in enumerate(before):
            rows = unit(x[batch.real.to(x.device)])
            target = wanted.to(x.device)
            products = torch.stack([rows.T @ rows, target.T @ rows])
            self.sum("products", products, at=layer)
            self.sum("means", torch.stack([rows.sum(0), target.sum(0)]), at=layer)
        self.sum("tokens", len(wanted))

    def result(self) -> TunedLens:
        """The maps.

        Raises:
            ValueError: No token has been seen, or the model has one layer.
        """
        if self.samples == 0 or "products" not in self:
            raise ValueError("No token has been seen before a last layer, so there is no lens.")
        tokens = int(self["tokens"])
        fitted = []
        for products, means in zip(self["products"] / tokens, self["means"] / tokens, strict=True):
            (xx, yx), (x, y) = products, means
            fitted.append(fit(xx, yx, x, y, self.ridge))
        weights, biases = (torch.stack(some).float().cpu() for some in zip(*fitted, strict=True))
        return TunedLens(weights, biases, tokens, self.identity)


@dataclass(frozen=True, eq=False, repr=False)
class LensDivergence(SampleCurves):
    """How far each layer's lens is from the model's own prediction, by modality.

    Attributes:
        values: `plain` and `tuned`: the divergence KL(last layer || lens) in nats, the mean over
            each sample's tokens.
        counts: How many tokens of the modality each sample has.
        modalities: Names of the third axis.
        identity: The model.
    """

    filename: ClassVar[str] = "lens-divergence.safetensors"

    measures = ("plain", "tuned")

    def __repr__(self) -> str:
        samples, layers = self.values.shape[:2]
        lines = [f"LensDivergence({samples} samples, {layers} layers; mean KL in nats)"]
        for modality, measure in self.pairs(1):
            row = self.of(modality, measure).mean(0).tolist()
            name = f"{modality}, {measure}"
            lines.append(f"{name:<18}" + "".join(f" {value:7.3f}" for value in row))
        return "\n".join(lines)


class LensDivergenceAnalyzer(Analyzer[LensDivergence]):
    """Holds the plain and a tuned logit lens against the model's own prediction.

    It streams: there are logits of a few positions at a time, of one layer and the last.

    Args:
        tuned: What `TunedLensAnalyzer` has made of other data.

    Example:
        found = ml.run(model, others, ml.LensDivergenceAnalyzer(tuned))
        found.curves()
    """

    def __init__(self, tuned: TunedLens) -> None:
        super().__init__("llm")
        self.tuned = tuned

    def begin(self, model: Any) -> None:
        """Note the model, its final norm and its head.

        Raises:
            ValueError: It has none, or the lens was fitted to another model.
        """
        super().begin(model)
        self._tuned = fitting(self.tuned, model)
        self._lens = Lens(model)

    def points(self, model: Any) -> Sequence[Point]:
        """The residual stream after each layer."""
        return residual_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Hold a layer's residual stream until the last one is there."""
        _held(batch)[point.layer] = x

    def finish(self, batch: Batch) -> None:
        """Keep means over each sample's tokens."""
        held = _held(batch)
        last = held[max(held)]
        step = max(1, MOST_LOGITS // (self._lens.vocabulary * len(last)))
        parts = [
            self._apart(held, range(first, min(first + step, last.shape[1])))
            for first in range(0, last.shape[1], step)
        ]
        divergence = torch.cat(parts, 1).double()  # [sample pos layer lens]
        names = [name for name in batch.masks if name not in UNIONS]
        masks = torch.stack([batch.masks[name] for name in names], 1).to(last.device).double()
        counts = masks.sum(-1)
        means = torch.einsum("spln,smp->slmn", divergence, masks)
        means = means / counts.clamp(min=1)[:, None, :, None]
        self.keep("values", means.float(), KEPT_SAMPLES)
        self.keep("counts", counts.long(), KEPT_SAMPLES)

    def result(self) -> LensDivergence:
        """The divergences in each sample.

        Raises:
            ValueError: No sample has been seen.
        """
        if self.samples == 0:
            raise ValueError("No sample has been seen, so no lens has been looked through.")
        names = tuple(name for name in self.occurrences if name not in UNIONS)
        counts = self["counts"].cpu()
        return LensDivergence(self["values"].cpu(), counts, names, identity=self.identity)

    def _apart(self, held: Mapping[int, Tensor], places: range) -> Tensor:
        """The divergences at some positions, [sample pos layer lens]."""
        some = slice(places.start, places.stop)
        end = max(held)
        wanted = self._logs(held[end][:, some])
        layers = []
        for layer in sorted(held):
            x = held[layer][:, some]
            seen = (self._logs(x), self._logs(self._tuned.translate(x, layer)))
            pair = [_divergence(wanted.to(one.device), one) for one in seen]
            layers.append(torch.stack(pair, -1).to(wanted.device))
        return torch.stack(layers, 2)

    def _logs(self, x: Tensor) -> Tensor:
        return self._lens.logits(x).float().log_softmax(-1)


def fitting(tuned: TunedLens, model: Any) -> TunedLens:
    """A tuned lens on the model's device.

    Raises:
        ValueError: It was fitted to another model.
    """
    if tuned.identity is not None:
        tuned.identity.check(identity(model), "The tuned lens")
    return tuned.to(input_device(model))


def _held(batch: Batch) -> dict[int, Tensor]:
    """The residual streams of this pass, by layer; all analyzers that hold them hold the same."""
    return batch.once("residual streams", dict)


def _divergence(wanted: Tensor, seen: Tensor) -> Tensor:
    """KL(wanted || seen) of log-probabilities; never below 0, as rounding may have it."""
    # Where a probability is 0 its logarithm may be -inf, and adds nothing.
    ratio = wanted.clamp(min=-1e4) - seen.clamp(min=-1e4)
    return (wanted.exp() * ratio).sum(-1).clamp(min=0)
