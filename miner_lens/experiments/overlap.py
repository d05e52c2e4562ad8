"""Which neurons belong to several modalities, and more of them than by chance?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING

import torch

from miner_lens.experiments.figures import panels
from miner_lens.experiments.result import Finding
from miner_lens.neurons.neuron_set import NeuronSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Overlap(Finding):
    """How many neurons belong to exactly these sets, by layer (what an UpSet plot counts).

    The table has a row for each combination of sets and layer: `combination` (names joined by `&`),
    `sets` (how many they are), `layer`, `neurons` (in all of them and in no other), and `expected`
    (what there would be if each set's neurons were drawn from the layer at random, as many as it
    has there).
    """

    @property
    def totals(self) -> dict[str, tuple[int, float]]:
        """Neurons and expected neurons of each combination, over all layers."""
        sums = self.frame.groupby("combination", sort=False)[["neurons", "expected"]].sum()
        return {str(name): (int(n), float(e)) for name, n, e in sums.itertuples()}

    @property
    def summary(self) -> str:
        """What several sets share, beside what they would by chance."""
        shared = [
            f"{name} {count} (by chance {expected:.1f})"
            for name, (count, expected) in self.totals.items()
            if "&" in name
        ]
        return f"Neurons in exactly these sets: {'; '.join(shared) or 'there is one set'}."

    def figure(self) -> Figure:
        """Neurons of each combination (bars) and those expected by chance (dots)."""
        found, (panel,) = panels(1)
        names = list(self.totals)
        counts, expected = zip(*self.totals.values(), strict=True)
        panel.barh(names, counts, color="#0072b2", label="neurons")
        panel.plot(expected, names, "o", color="#d55e00", label="expected by chance")
        panel.invert_yaxis()
        panel.set_xlabel("neurons in exactly these sets")
        panel.legend(frameon=False)
        return found


def overlap(neurons: Mapping[str, NeuronSet]) -> Overlap:
    """How sets of neurons overlap, layer by layer.

    Args:
        neurons: Sets by name, as `select` returns them.

    Raises:
        ValueError: There are no sets, or they are of different models or sites.

    Example:
        >>> image = NeuronSet([(0, 0), (0, 1)], layers=1, neurons=4)
        >>> text = NeuronSet([(0, 1)], layers=1, neurons=4)
        >>> overlap({"image": image, "text": text}).totals
        {'image': (1, 1.5), 'text': (0, 0.5), 'image & text': (1, 0.5)}
    """
    import pandas as pd

    model = NeuronSet.union(neurons)  # which refuses what does not mix
    masks = {name: chosen.mask for name, chosen in neurons.items()}
    widths = model.exists.sum(1).tolist()
    shares = {
        name: [count / width for count, width in zip(chosen.counts(), widths, strict=True)]
        for name, chosen in neurons.items()
    }
    rows = []
    for size in range(1, len(neurons) + 1):
        for inside in combinations(neurons, size):
            outside = [name for name in neurons if name not in inside]
            exactly = torch.stack([masks[name] for name in inside]).all(0)
            for name in outside:
                exactly &= ~masks[name]
            for layer, count in enumerate(exactly.sum(1).tolist()):
                chance = prod(shares[name][layer] for name in inside)
                chance *= prod(1 - shares[name][layer] for name in outside)
                row = {"combination": " & ".join(inside), "sets": size, "layer": layer}
                rows.append(row | {"neurons": count, "expected": widths[layer] * chance})
    return Overlap(pd.DataFrame(rows), {"site": model.site})
