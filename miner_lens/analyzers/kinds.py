"""Neurons sorted by what drives them: a medium, text, or both (Xu et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miner_lens.models.points import Point, activation_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring.kinds import UNKNOWN, NeuronKinds, kind_shares

# Tokens that must be above the threshold, as published.
MEDIUM_TOKENS, TEXT_TOKENS = 4, 2
NONE = -3.0e38  # where a sample has fewer tokens; finite, as -inf would be refused


class KindAnalyzer(Analyzer[NeuronKinds]):
    """Sorts decoder neurons into those of a medium, of text and of both.

    For each neuron, the samples in which its activation is highest (at a token of the medium or of
    text) are looked at. In each, a neuron is driven by the medium if at least 4 of the medium's
    tokens are above 2, and by text if at least 2 text tokens are above 3, on a scale on which the
    neuron's highest activation is 10. Its kind is the commonest of the four that this makes (Xu et
    al. 2025, arXiv 2502.18485). The published samples all have an image and text; where some have
    not, those count too.

    It takes one pass: of each sample it keeps the 4th highest activation at the medium's tokens and
    the 2nd highest at text tokens, which say whether enough tokens are above any threshold.

    Args:
        medium: `"image"`, `"video"` or `"audio"`.
        top: How many samples to look at for each neuron.

    Example:
        kinds = ml.run(model, data, ml.KindAnalyzer())
        neurons = kinds.select()["multimodal"]
    """

    def __init__(self, medium: str = "image", top: int = 50) -> None:
        super().__init__("llm")
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}.")
        self.medium, self.top_samples = medium, top

    def points(self, model: Any) -> list[Point]:
        """X of every layer."""
        return activation_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Keep what each neuron does in the samples that drive it most.

        Raises:
            ValueError: The data know of no such medium.
        """
        if self.medium not in batch.masks:
            raise ValueError(
                f"The data know of no modality {self.medium!r}, only of {', '.join(batch.masks)}."
            )
        wide = x.float()
        own = batch.masks[self.medium].to(x.device)
        text = batch.masks["text"].to(x.device)
        real = batch.real.to(x.device)
        highest = wide.masked_fill(~real[..., None], NONE).amax((0, 1))
        self.max("highest", self.widened(highest, NONE), at=point.layer)
        medium_high = self.widened(_highest(wide, own, MEDIUM_TOKENS), NONE)
        text_high = self.widened(_highest(wide, text, TEXT_TOKENS), NONE)
        # Ids of a top are whole numbers: the bits of what just enough tokens reach.
        tops = torch.maximum(medium_high[:, 0], text_high[:, 0])
        index = torch.tensor(batch.index, device=x.device)[:, None].expand(tops.shape)
        reached = [_bits(medium_high[:, -1]), _bits(text_high[:, -1])]
        ids = torch.stack([index, *reached], -1)
        self.top("tops", tops, ids, self.top_samples, at=point.layer)

    def result(self) -> NeuronKinds:
        """The shares of each kind."""
        if self.samples == 0:
            raise ValueError("No sample has been seen, so no neuron can be sorted.")
        found = self["tops"]
        medium, text = (_floats(found.ids[..., part]).cpu() for part in (1, 2))
        shares = kind_shares(found.values.cpu(), medium, text, self["highest"].cpu())
        kinds = (self.medium, "text", "multimodal", UNKNOWN)
        return NeuronKinds(shares, kinds, self.samples, self.identity)


def _highest(x: Tensor, mask: Tensor, count: int) -> Tensor:
    """[sample rank neuron], the highest activations at some tokens, falling."""
    x = x.masked_fill(~mask[..., None], NONE)
    if x.shape[1] < count:
        x = torch.nn.functional.pad(x, (0, 0, 0, count - x.shape[1]), value=NONE)
    return x.topk(count, dim=1).values


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).long()


def _floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).contiguous().view(torch.float32)
