"""Figures of results. They compute nothing; each takes a result and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from miner_lens.experiments.figures import COLOURS, colours_of
from miner_lens.experiments.figures import panels as _figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from miner_lens.neurons.neuron_set import NeuronSet


def by_ratio(table: pd.DataFrame, measure: str) -> Figure:
    """A measure against the share of neurons selected, one panel for each input modality.

    Args:
        table: Columns `input`, `off`, `ratio`, `value`, and `low` and `high`, drawn as a band, one
            row for each condition; the row whose `off` is `"nothing"` is drawn as a level line.
        measure: What the values are, with their unit.
    """
    figure, panels = _figure(len(table["input"].unique()))
    for panel, (name, rows) in zip(panels, table.groupby("input", sort=False), strict=True):
        for off, line in rows.groupby("off", sort=False):
            _draw_condition(panel, str(off), line)
        panel.set(title=f"asked about the {name}", xlabel="neurons selected (%)", xscale="log")
        ratios = sorted(100 * table["ratio"].dropna().unique())
        panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(title="switched off", frameon=False, fontsize="small")
    panels[0].set_ylabel(measure)
    return figure


def curves(table: pd.DataFrame, measure: str, by: str = "modality") -> Figure:
    """A measure against the layer, a line for each modality, with intervals as bands.

    Args:
        table: Columns `layer`, `mean`, `low`, `high` and that of `by`, such as the `curves()` of a
            result; rows of other measures are left out where there is a column `measure`, and a
            `null` is a dotted line.
        measure: The measure.
        by: The column that tells lines apart.
    """
    rows = table[table["measure"] == measure] if "measure" in table else table
    figure, (panel,) = _figure(1)
    colours = colours_of(map(str, rows[by]))
    for name, line in rows.groupby(by, sort=False):
        colour = colours[str(name)]
        panel.plot(line["layer"], line["mean"], color=colour, label=name)
        panel.fill_between(line["layer"], line["low"], line["high"], color=colour, alpha=0.15)
        if "null" in line:
            panel.plot(line["layer"], line["null"], ":", color=colour)
    panel.set(xlabel="layer", ylabel=measure)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize="small")
    return figure


def costs(table: pd.DataFrame, measure: str) -> Figure:
    """What conditions cost, with intervals, one panel for each label.

    Args:
        table: What `statistics.costs` returns, without the intact model.
        measure: `"correct"` or `"logprob"`.
    """
    rows = table[table["measure"] == measure]
    groups = list(rows.groupby("label", sort=False, dropna=False))
    # As high as its lines of words are.
    height = max(3.6, 1 + 0.2 * rows["condition"].nunique())
    figure, panels = _figure(len(groups), height=height)
    for panel, (label, own) in zip(panels, groups, strict=True):
        sides = [own["cost"] - own["low"], own["high"] - own["cost"]]
        panel.errorbar(own["cost"], own["condition"], xerr=sides, fmt="o", capsize=3)
        panel.axvline(0, color="black", linewidth=0.8)
        unit = "nats" if measure == "logprob" else "share of answers"
        panel.set(xlabel=f"cost ({unit})", title="" if label != label else str(label))
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    return figure


def scatter(table: pd.DataFrame) -> Figure:
    """Tokens in two dimensions, coloured by modality.

    Args:
        table: Columns `modality`, `x` and `y`, such as `HiddenStates.embed` makes.
    """
    figure, (panel,) = _figure(1)
    colours = colours_of(map(str, table["modality"]))
    for name, rows in table.groupby("modality", sort=False):
        panel.scatter(rows["x"], rows["y"], s=8, alpha=0.6, color=colours[str(name)], label=name)
    panel.set(xticks=[], yticks=[])
    panel.legend(frameon=False, fontsize="small")
    return figure


def _draw_condition(panel: Any, off: str, line: pd.DataFrame) -> None:
    if off == "nothing":
        panel.axhline(line["value"].iloc[0], color="black", linestyle=":", label=off)
        return
    kind = off.split(",")[0].removesuffix(" MSNs")
    colour = COLOURS.get(kind, "#999999")
    style = "-" if off.endswith("MSNs") else "--"
    line = line.sort_values("ratio")
    x = 100 * line["ratio"]
    panel.plot(x, line["value"], style, marker="o", markersize=4, color=colour, label=off)
    panel.fill_between(x, line["low"], line["high"], color=colour, alpha=0.15)


def neurons_by_layer(neurons: Mapping[str, NeuronSet]) -> Figure:
    """How many neurons of each modality every layer has, as grouped bars, one panel for each site.

    Args:
        neurons: Sets by name, as `select` returns them.

    Raises:
        ValueError: There are no sets.
    """
    if not neurons:
        raise ValueError("There are no neurons to draw: the mapping of names to sets is empty.")
    found = list(dict.fromkeys(chosen.site for chosen in neurons.values()))
    figure, panels = _figure(len(found))
    for panel, site in zip(panels, found, strict=True):
        here = {name: chosen for name, chosen in neurons.items() if chosen.site == site}
        _draw_layers(panel, site, here)
    panels[0].set_ylabel("neurons")
    panels[-1].legend(title="modality", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_layers(panel: Any, site: str, neurons: Mapping[str, NeuronSet]) -> None:
    width, colours = 0.8 / len(neurons), colours_of(neurons)
    for place, (modality, chosen) in enumerate(neurons.items()):
        layers = [
            layer + (place - (len(neurons) - 1) / 2) * width for layer in range(chosen.layers)
        ]
        panel.bar(layers, chosen.counts(), width, label=modality, color=colours[modality])
    panel.set(xlabel=f"layer of the {site}")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(axis="y", alpha=0.3)
