"""Where single neurons fire: the samples that fire them most, and each token of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from miner_lens.models.points import Point, activation_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch


class TopActivationsAnalyzer(Analyzer[list[tuple[int, int, float]]]):
    """The samples in which a decoder neuron is most active at any token of the prompt.

    The result has a triple for each of them, falling: the sample's place in the data, the position
    among its real tokens, and X there.

    Args:
        layer: The neuron's layer.
        neuron: Its place in the layer.
        k: So many samples at most.

    Example:
        best = ml.run(model, data, ml.TopActivationsAnalyzer(layer=3, neuron=17, k=5))
    """

    def __init__(self, layer: int, neuron: int, k: int = 10) -> None:
        super().__init__("llm")
        self.layer, self.neuron, self.k = layer, neuron, k

    def points(self, model: Any) -> Sequence[Point]:
        """X of the layer."""
        return [activation_points(model)[self.layer]]

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Keep each sample's largest activation and where it was."""
        own = x[..., self.neuron].float()
        best, position = own.masked_fill(~batch.real.to(x.device), -torch.inf).max(1)
        places = batch.places.to(x.device)[torch.arange(len(own), device=x.device), position]
        self.top("samples", best, places, self.k)

    def result(self) -> list[tuple[int, int, float]]:
        """The samples, the one with the largest activation first."""
        found = self["samples"]
        rows = zip(found.ids.tolist(), found.values.tolist(), strict=True)
        return [(place, pos, value) for (place, pos), value in rows if place >= 0]


@dataclass(frozen=True, eq=False)
class TokenActivations:
    """What a neuron does at each token of one prompt.

    Attributes:
        ids: The tokens.
        activations: X.
        written: X times the up projection, the factor of the neuron's output direction in what
            the MLP writes; None where the model has no hook point there.
        masks: The tokens of each modality.
        grids: For `image` and `video`, (frames, rows, columns) of patches of each item as the
            model's inputs have them, before patches are merged into tokens.
    """

    ids: Int[Tensor, " pos"]
    activations: Float[Tensor, " pos"]
    written: Float[Tensor, " pos"] | None
    masks: dict[str, Bool[Tensor, " pos"]]
    grids: dict[str, list[tuple[int, int, int]]]


class TokenActivationsAnalyzer(Analyzer[TokenActivations]):
    """What a decoder neuron does at each token of one prompt; to be run on one sample.

    Args:
        layer: The neuron's layer.
        neuron: Its place in the layer.
    """

    def __init__(self, layer: int, neuron: int) -> None:
        super().__init__("llm")
        self.layer, self.neuron = layer, neuron

    def points(self, model: Any) -> Sequence[Point]:
        """X of the layer, and what its down projection takes, where that can be hooked."""
        down = f"blocks.{self.layer}.mlp.out.hook_in"
        written = [Point(down, self.layer)] if down in model.hook_dict else []
        return [activation_points(model)[self.layer], *written]

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Keep the neuron's values; of X also what the tokens are.

        Raises:
            ValueError: There are several samples in the pass.
        """
        if len(batch.ids) != 1:
            raise ValueError(f"TokenActivationsAnalyzer reads one sample, not {len(batch.ids)}.")
        if point != self.reading[0]:
            self.sum("written", x[0, :, self.neuron].float())
            return
        self.sum("x", x[0, :, self.neuron].float())
        self.sum("ids", batch.inputs["input_ids"][0])
        for modality, mask in batch.masks.items():
            self.sum(f"mask/{modality}", mask[0].long())
        for medium in ("image", "video"):
            if batch.inputs.get(f"{medium}_grid_thw") is not None:
                self.sum(f"grid/{medium}", batch.inputs[f"{medium}_grid_thw"].long())

    def result(self) -> TokenActivations:
        """The values of the prompt."""
        masks = {
            name: self[f"mask/{name}"].bool().cpu()
            for name in self.occurrences
            if f"mask/{name}" in self
        }
        grids = {
            medium: [(frames, rows, columns) for frames, rows, columns in grid.tolist()]
            for medium in ("image", "video")
            if f"grid/{medium}" in self
            for grid in [self[f"grid/{medium}"]]
        }
        written = self["written"].float().cpu() if "written" in self else None
        return TokenActivations(self["ids"].cpu(), self["x"].float().cpu(), written, masks, grids)
