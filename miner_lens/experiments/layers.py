"""In which layers do a modality's neurons lie?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from miner_lens.experiments.figures import COLOURS, panels
from miner_lens.experiments.result import Finding
from miner_lens.neurons.neuron_set import NeuronSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class LayerDistribution(Finding):
    """How many neurons of each set lie in each layer.

    The table has a row for each set and layer: `modality`, `layer`, `neurons`, `share` (of the
    set's neurons; 0 of an empty set) and `even` (the share that an even distribution would give).
    """

    @property
    def summary(self) -> str:
        """The mean layer of each set, and the layer with most of it."""
        parts = []
        for name, rows in self.frame.groupby("modality", sort=False):
            if not rows["neurons"].sum():
                parts.append(f"{name} has none")
                continue
            centre = float((rows["layer"] * rows["share"]).sum())
            most = rows.loc[rows["neurons"] == rows["neurons"].max()].iloc[0]
            parts.append(
                f"{name} lies at layer {centre:.1f} on average, most in layer {most['layer']} "
                f"({most['share']:.0%}; evenly it would be {most['even']:.0%})"
            )
        return f"Of the neurons of each modality: {'; '.join(parts)}."

    def figure(self) -> Figure:
        """Share by layer, a line for each set; dotted: evenly distributed."""
        found, (panel,) = panels(1)
        for name, rows in self.frame.groupby("modality", sort=False):
            colour = COLOURS.get(str(name))
            panel.plot(rows["layer"], rows["share"], marker="o", color=colour, label=name)
        panel.axhline(self.frame["even"].iloc[0], color="black", linestyle=":", label="even")
        panel.set(xlabel=f"layer of the {self.info['site']}", ylabel="share of the set's neurons")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
        return found


def layer_distribution(neurons: Mapping[str, NeuronSet]) -> LayerDistribution:
    """How a selection is distributed over layers.

    Args:
        neurons: Sets by name, as `select` returns them.

    Raises:
        ValueError: There are no sets, or they are of different models or sites.

    Example:
        >>> sets = {"image": NeuronSet([(0, 0), (1, 1), (1, 2)], layers=2, neurons=4)}
        >>> layer_distribution(sets).frame["share"].round(2).tolist()
        [0.33, 0.67]
    """
    import pandas as pd

    model = NeuronSet.union(neurons)  # which refuses what does not mix
    tables = []
    for name, chosen in neurons.items():
        counts = np.array(chosen.counts())
        tables.append(
            pd.DataFrame(
                {
                    "modality": name,
                    "layer": range(model.layers),
                    "neurons": counts,
                    "share": counts / max(1, counts.sum()),
                    "even": 1 / model.layers,
                }
            )
        )
    return LayerDistribution(pd.concat(tables, ignore_index=True), {"site": model.site})
