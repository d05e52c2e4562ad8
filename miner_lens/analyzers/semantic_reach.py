"""Semantic probing and semantic telomeres, of each sample as it passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from miner_lens.models.modality import UNIONS
from miner_lens.models.points import Point, residual_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring.arrangement import labellings, probing, telomeres
from miner_lens.scoring.semantic_reach import SemanticReach

KEPT_SAMPLES = 10_000
LEAST = 3  # tokens, of which an arm or an end can be told


class Drawn(NamedTuple):
    """Of which tokens a measure of a sample is, in all layers.

    Attributes:
        row: The sample's row in the batch.
        places: Positions of its tokens, of the first kind and then of the second.
        first: How many are of the first kind.
        labels: The places of both kinds among these, for each labelling.
    """

    row: int
    places: Int[Tensor, " token"]
    first: int
    labels: Int[Tensor, "labelling token"]


class SemanticReachAnalyzer(Analyzer[SemanticReach]):
    """Measures whether media reach out towards text, and special tokens stand at its two ends.

    MINER (Huang et al. 2024) calls these semantic probing and semantic telomeres, and shows them
    as pictures. The definitions are ours: `miner_lens.scoring.arrangement.probing` of the residual
    stream at each medium's tokens and text tokens, `telomeres` of that at text and special tokens,
    in each layer, each beside a null in which the sample's tokens are shuffled between the two.

    A sample counts that has at least 3 tokens of the cloud that is measured, and, for telomeres,
    2 special tokens.

    Args:
        tokens: At most so many tokens of each modality of a sample, drawn without replacement.
        shuffles: Of the null.

    Example:
        reach = ml.run(model, data, ml.SemanticReachAnalyzer())
        reach.curves()
    """

    def __init__(self, tokens: int = 64, shuffles: int = 20) -> None:
        super().__init__("llm")
        if tokens < LEAST or shuffles < 1:
            raise ValueError(
                f"Draw at least {LEAST} tokens and 1 shuffle, not {tokens} and {shuffles}."
            )
        self.tokens, self.shuffles = tokens, shuffles

    def points(self, model: Any) -> Sequence[Point]:
        """The residual stream after each layer."""
        return residual_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Measure each sample in a layer."""
        for name, some in self._drawn(batch).items():
            of = telomeres if name.startswith("telomeres") else probing
            self._layers(batch)[name, point.layer] = torch.stack(
                [_measured(of, x[one.row], one) for one in some]
            )

    def finish(self, batch: Batch) -> None:
        """Keep what all layers have given."""
        found = self._layers(batch)
        for name, some in self._drawn(batch).items():
            order = sorted(layer for other, layer in found if other == name)
            device = found[name, order[0]].device
            values = torch.stack([found[name, layer].to(device) for layer in order], 1)
            ids = torch.tensor([batch.index[one.row] for one in some], device=device)
            self.keep(f"{name}/values", values.float(), KEPT_SAMPLES, ids=ids)
            self.keep(f"{name}/samples", ids, KEPT_SAMPLES, ids=ids)

    def result(self) -> SemanticReach:
        """The measures of each sample.

        Raises:
            ValueError: No sample has had enough tokens.
        """
        media = (f"probing/{name}" for name in self.occurrences)
        asked = (*media, "telomeres/special")
        names = [name for name in asked if f"{name}/values" in self]
        if not names:
            raise ValueError(
                f"No sample of {self.samples} has {LEAST} tokens of a medium beside text, or "
                f"{LEAST} of text and 2 special tokens, so there is nothing to measure."
            )
        values, samples = (
            {name: self[f"{name}/{part}"].cpu() for name in names} for part in ("values", "samples")
        )
        return SemanticReach(values, samples, self.identity)

    def _layers(self, batch: Batch) -> dict[tuple[str, int], Tensor]:
        """What the layers of this pass have given, by measure and layer."""
        return batch.once(("reach", id(self)), dict)

    def _drawn(self, batch: Batch) -> dict[str, list[Drawn]]:
        return batch.once(("reach tokens", id(self)), lambda: self._draw(batch))

    def _draw(self, batch: Batch) -> dict[str, list[Drawn]]:
        """By measure, the tokens of each sample that has enough of them.

        They depend on the sample's place in the data alone, counted from its first real token.
        """
        masks = {name: mask.cpu() for name, mask in batch.masks.items() if name not in UNIONS}
        if "text" not in masks:
            return {}
        text = masks.pop("text")
        special = masks.pop("special", torch.zeros_like(text))
        drawn = {
            f"probing/{name}": self._pairs(batch, mask, text, 1) for name, mask in masks.items()
        }
        drawn["telomeres/special"] = self._pairs(batch, text, special, 2)
        return {name: some for name, some in drawn.items() if some}

    def _pairs(self, batch: Batch, cloud: Tensor, other: Tensor, least: int) -> list[Drawn]:
        """Tokens of a cloud and of another, in the samples that have enough of both."""
        found = []
        for row, index in enumerate(batch.index):
            if int(cloud[row].sum()) < LEAST or int(other[row].sum()) < least:
                continue
            lots = torch.Generator().manual_seed(index)
            some = [
                own[torch.randperm(len(own), generator=lots)[: self.tokens]]
                for own in (mask[row].nonzero()[:, 0] for mask in (cloud, other))
            ]
            first, second = map(len, some)
            labels = labellings(first, second, self.shuffles, index)
            found.append(Drawn(row, torch.cat(some), first, labels))
        return found


def _measured(of: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, drawn: Drawn) -> Tensor:
    """A measure of one sample's residual stream, [labelling]."""
    labels = drawn.labels.to(x.device)
    here = x[drawn.places.to(x.device)]
    return of(here, labels[:, : drawn.first], labels[:, drawn.first :])
