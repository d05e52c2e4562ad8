"""Hidden states by modality and layer, of which convergence is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from miner_lens.models.modality import UNIONS
from miner_lens.models.points import Point, residual_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring.hidden_states import HiddenStates


class ConvergenceAnalyzer(Analyzer[HiddenStates]):
    """Keeps the residual stream after each layer at each modality's tokens, of some samples.

    Of each sample and modality (but unions such as `prompt`) it keeps the mean over tokens, and a
    few tokens drawn at random with replacement. `HiddenStates.curves` measures whether modalities
    converge: CKA, centroid distance against spread, linear separability and effective dimension,
    each with an interval and a shuffled null (what MINER, Huang et al. 2024, shows as a picture).

    Args:
        samples: How many samples to keep, at random. Memory is of samples x layers x (tokens + 1) x
            d_model numbers for each modality.
        tokens: How many tokens to draw in each sample.

    Example:
        states = ml.run(model, data, ml.ConvergenceAnalyzer())
        states.curves(["cka", "distance"])
    """

    def __init__(self, samples: int = 100, tokens: int = 4) -> None:
        super().__init__("llm")
        if samples < 1 or tokens < 1:
            raise ValueError(f"Keep at least 1 sample and 1 token, not {samples} and {tokens}.")
        self.kept, self.tokens = samples, tokens

    def points(self, model: Any) -> Sequence[Point]:
        """The residual stream after each layer."""
        return residual_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Take a layer's means and drawn tokens."""
        layers: dict[int, dict[str, Tensor]] = batch.once(("states", id(self)), dict)
        layers[point.layer] = taken = {}
        for name, (rows, places) in batch.once(
            ("drawn", id(self)), lambda: self._draw(batch)
        ).items():
            here = x[rows.to(x.device)].float()
            mask = batch.masks[name].to(x.device)[rows.to(x.device)].float()
            means = einsum(mask, here, "sample pos, sample pos d_model -> sample d_model")
            at = places.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
            taken[name] = torch.cat(
                [means[:, None] / mask.sum(1)[:, None, None], here.gather(1, at)], 1
            )

    def finish(self, batch: Batch) -> None:
        """Keep what all layers have given."""
        layers: dict[int, dict[str, Tensor]] = batch.once(("states", id(self)), dict)
        index = torch.tensor(batch.index)
        for name, (rows, _) in batch.once(("drawn", id(self)), lambda: self._draw(batch)).items():
            device = layers[0][name].device
            states = torch.stack([layers[n][name].to(device) for n in sorted(layers)], 1)
            ids = index[rows].to(device)
            self.keep(f"{name}/states", states, self.kept, ids=ids)
            self.keep(f"{name}/samples", ids, self.kept, ids=ids)

    def result(self) -> HiddenStates:
        """The states that were kept, by modality."""
        names = [name for name in self.occurrences if f"{name}/states" in self]
        if not names:
            raise ValueError("No sample has been seen, so there are no hidden states.")
        states = {name: self[f"{name}/states"].cpu() for name in names}
        return HiddenStates(
            {name: one[:, :, 0] for name, one in states.items()},
            {name: one[:, :, 1:] for name, one in states.items()},
            {name: self[f"{name}/samples"].cpu() for name in names},
            self.identity,
        )

    def _draw(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """By modality, the rows of the batch that have it, and the drawn places in each.

        They depend on the sample's place in the data alone, counted from its first real token.
        """
        drawn = {}
        for name, mask in batch.masks.items():
            if name in UNIONS:
                continue
            there, rows, places = mask.cpu(), [], []
            for row, index in enumerate(batch.index):
                own = there[row].nonzero()[:, 0]
                if len(own):
                    lots = torch.Generator().manual_seed(index)
                    rows.append(row)
                    places.append(own[torch.randint(len(own), (self.tokens,), generator=lots)])
            if rows:
                drawn[name] = torch.tensor(rows), torch.stack(places)
        return drawn
