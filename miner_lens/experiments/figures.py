"""What figures share: colours by modality, and panels side by side."""

from __future__ import annotations

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


def panels(count: int) -> tuple[Figure, list[Any]]:
    """A figure of so many panels in a row, which share the y axis.

    Raises:
        ImportError: matplotlib is missing.
    """
    # Not through pyplot, which would pick a window system and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4 * count, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
