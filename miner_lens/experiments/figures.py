"""What figures share: colours by modality, and panels side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
# For names that have no colour of their own, or whose colour another name has.
OTHERS = ("#882255", "#999933", "#332288", "#44aa99", "#56b4e9", "#e69f00", "#999999")


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: its own where it has one that is free, else one of the others.

    Example:
        >>> colours_of(["text", "last"]) == {"text": "#d55e00", "last": "#882255"}
        True
    """
    names, found = list(dict.fromkeys(names)), dict[str, str]()
    for name in names:
        if name in COLOURS and COLOURS[name] not in found.values():
            found[name] = COLOURS[name]
    free = [one for one in OTHERS if one not in found.values()]
    rest = [name for name in names if name not in found]
    return found | {name: free[n % len(free)] for n, name in enumerate(rest)}


def panels(count: int, columns: int | None = None, height: float = 3.6) -> tuple[Figure, list[Any]]:
    """A figure of so many panels, in one row or in rows of `columns`, which share the y axis.

    Args:
        count: So many.
        columns: So many in a row; default all.
        height: Of a row, in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    from miner_lens.experiments.shown_figure import ShownFigure

    columns = columns or count
    rows = -(-count // columns)
    figure = ShownFigure(1.5 + 4 * columns, height * rows)
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]
