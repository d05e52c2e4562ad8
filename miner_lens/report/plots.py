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
}


def accuracy_by_ratio(table: pd.DataFrame) -> Figure:
    """Accuracy against the share of neurons selected, one panel for each input modality.

    Args:
        table: Columns `input`, `off`, `ratio`, `accuracy` and `spread`, one row for each
            condition; the row whose `off` is `"nothing"` is drawn as a level line, and
            `spread`, where it is not missing, as a band.
    """
    figure, panels = _figure(len(table["input"].unique()))
    lowest = max(0.0, float(table["accuracy"].min()) - 0.05)
    for panel, (name, rows) in zip(panels, table.groupby("input", sort=False), strict=True):
        for off, line in rows.groupby("off", sort=False):
            _draw_condition(panel, str(off), line)
        panel.set(title=f"asked about the {name}", xlabel="neurons selected (%)", xscale="log")
        ratios = sorted(100 * table["ratio"].dropna().unique())
        panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        panel.minorticks_off()
        panel.set_ylim(lowest, 1.01)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(title="switched off", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_condition(panel: Any, off: str, line: pd.DataFrame) -> None:
    if off == "nothing":
        panel.axhline(line["accuracy"].iloc[0], color="black", linestyle=":", label=off)
        return
    colour = COLOURS.get(off.removeprefix("random, ").split(" ")[0], "#999999")
    style = ":" if off == "random, as all MSNs" else "--" if off.startswith("random") else "-"
    line = line.sort_values("ratio")
    x, y = 100 * line["ratio"], line["accuracy"]
    panel.plot(x, y, style, marker="o", markersize=4, color=colour, label=off)
    if line["spread"].notna().any():
        panel.fill_between(x, y - line["spread"], y + line["spread"], color=colour, alpha=0.15)


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
    # Not through pyplot, which would pick a window system and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4 * panels, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
