"""Figures of results. They compute nothing; each takes a result and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from miner_lens.neurons.neuron_set import NeuronSet

COLOURS = {
    "image": "#0072b2",
    "text": "#d55e00",
    "special": "#009e73",
    "special_text": "#d55e00",
    "video": "#56b4e9",
    "audio": "#cc79a7",
    "prompt": "#000000",
    "all": "#e69f00",
    "random": "#999999",
    "layer-matched": "#555555",
}


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
    width = 0.8 / len(neurons)
    for place, (modality, chosen) in enumerate(neurons.items()):
        layers = [
            layer + (place - (len(neurons) - 1) / 2) * width for layer in range(chosen.layers)
        ]
        colour = COLOURS.get(modality)
        panel.bar(layers, chosen.counts(), width, label=modality, color=colour)
    panel.set(xlabel=f"layer of the {site}")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(axis="y", alpha=0.3)


def _figure(panels: int) -> tuple[Figure, list[Any]]:
    from miner_lens.report.figure import ShownFigure

    figure = ShownFigure(1.5 + 4 * panels, 3.6)
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
