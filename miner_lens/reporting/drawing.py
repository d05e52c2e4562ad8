"""Figures as SVG that a page can work with: values to point at, and series to switch."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Points of an inch, in which matplotlib writes SVG, and pixels of a page.
POINTS, PIXELS = 72, 96
# A line of more points is a curve, whose points nobody points at.
MOST_POINTS = 400


def svg(name: str, label: str, figure: Figure) -> str:
    """A figure as SVG whose ids are its own, so that several stand on one page.

    The page's script finds series by ids `NAME-series-N-…`, what names them in a legend by
    `NAME-legend-N-…`, and values in the group of class `values`.

    Args:
        name: What all ids begin with.
        label: What it shows, as HTML.
        figure: The figure; it is as before when this returns.
    """
    import matplotlib

    file = io.StringIO()
    # The same figure gives the same file.
    how: dict[Any, Any] = {"svg.hashsalt": name, "svg.fonttype": "path"}
    with matplotlib.rc_context(how), _marked(figure) as (names, series):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        circles = "".join(_values(figure, series))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = text.rpartition("</svg>")[0] + f'<g class="values">{circles}</g></svg>'
    width = float(figure.get_size_inches()[0]) * PIXELS
    listed = escape(json.dumps(names))
    named = f'<svg role="group" aria-label="{label}" data-series="{listed}" '
    named += f'style="max-width: {width:.0f}px; '
    # On a narrow page it scrolls before it is too small to read.
    named += f'min-width: {0.7 * width:.0f}px" '
    return text.replace("<svg ", named, 1)


@contextmanager
def _marked(figure: Figure) -> Iterator[tuple[list[str], dict[int, int]]]:
    """Ids for what legends name and for its parts, while the figure is written.

    Yields:
        The names, in the order of their numbers, and the number of an artist's series, by the
        artist's `id`.
    """
    names = list(dict.fromkeys(text.get_text() for one in figure.axes for text in _legend(one)[1]))
    numbers = {name: number for number, name in enumerate(names)}
    series: dict[int, int] = {}
    given: list[Any] = []

    def mark(artist: Any, kind: str, number: int) -> None:
        if artist.get_gid() is None:
            artist.set_gid(f"{kind}-{number}-{len(given)}")
            given.append(artist)

    for axes in figure.axes:
        for name, artists in _series(axes):
            if name in numbers:
                for artist in artists:
                    mark(artist, "series", numbers[name])
                    series[id(artist)] = numbers[name]
        for artist, text in zip(*_legend(axes), strict=True):
            for part in (artist, text):
                mark(part, "legend", numbers[text.get_text()])
    try:
        yield names, series
    finally:
        for artist in given:
            artist.set_gid(None)


def _legend(axes: Any) -> tuple[list[Any], list[Any]]:
    """What a legend draws, and the words beside it."""
    legend = axes.get_legend()
    if legend is None:
        return [], []
    words, drawn = legend.get_texts(), legend.legend_handles
    return (list(drawn), list(words)) if len(words) == len(drawn) else ([], [])


def _series(axes: Any) -> Iterator[tuple[str, list[Any]]]:
    """The label of each series, and all that is drawn of it."""
    from matplotlib.colors import to_hex

    for container in axes.containers:
        yield str(container.get_label()), [*_flat(container), *_flat(_errors(container))]
    bands = [one for one in axes.collections if len(one.get_facecolor())]
    for line in axes.get_lines():
        colour = to_hex(line.get_color())
        # The band around a line has no name, but its colour.
        around = [one for one in bands if to_hex(one.get_facecolor()[0]) == colour]
        yield str(line.get_label()), [line, *around]
    for one in axes.collections:
        yield str(one.get_label()), [one]


def _errors(container: Any) -> Any:
    return getattr(container, "errorbar", None) or ()


def _flat(container: Any) -> Iterator[Any]:
    """The artists of a container of matplotlib's, which has tuples of them and None."""
    for one in container:
        if isinstance(one, tuple | list):
            yield from _flat(one)
        elif one is not None:
            yield one


def _values(figure: Figure, series: dict[int, int]) -> Iterator[str]:
    """A circle for each value drawn, with its words; of images, one for each cell."""
    inches = figure.get_size_inches()
    for axes in figure.axes:
        place = axes.transData + figure.transFigure.inverted()
        for artist, x, y, words in _points(axes):
            across, up = place.transform((x, y))
            if not (0 <= across <= 1 and 0 <= up <= 1):
                continue
            left, top = across * inches[0] * POINTS, (1 - up) * inches[1] * POINTS
            of = f' data-series="{series[id(artist)]}"' if id(artist) in series else ""
            yield (
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5"{of}>'
                f"<title>{escape(words)}</title></circle>"
            )


def _points(axes: Any) -> Iterator[tuple[Any, float, float, str]]:
    """The artist, place and words of all values of a panel."""
    panel = axes.get_title()
    start = f"{panel}; " if panel else ""
    names = {id(artist): name for name, artists in _series(axes) for artist in artists}

    def said(artist: Any, x: float, y: float) -> str:
        name = names.get(id(artist), "")
        named = "" if name.startswith("_") or not name else f"{name}; "
        return f"{start}{named}{_at(axes.xaxis, x)}; {_at(axes.yaxis, y)}"

    ends = {
        id(one)
        for container in axes.containers
        for one in (*_flat(container[1:]), *_flat(_errors(container)))
        if not _is_bar(one)
    }
    for line in axes.get_lines():
        points = line.get_xydata()
        if id(line) in ends or line.get_transform() != axes.transData or len(points) > MOST_POINTS:
            continue
        for x, y in points:
            if x == x and y == y:
                yield line, x, y, said(line, x, y)
    for container in axes.containers:
        lying = getattr(container, "orientation", "vertical") == "horizontal"
        for bar in filter(_is_bar, container):
            x, y = bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2
            if not lying:
                x, y = bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height()
            # Bars side by side stand around whole numbers.
            yield bar, x, y, said(bar, x, round(y)) if lying else said(bar, round(x), y)
    for image in axes.images:
        for (row, column), value in _cells(image):
            at = f"{_at(axes.yaxis, row)}; {_at(axes.xaxis, column)}"
            yield image, column, row, f"{start}{at}: {value:.4g}"


def _is_bar(artist: Any) -> bool:
    return hasattr(artist, "get_height") and hasattr(artist, "get_width")


def _cells(image: Any) -> Iterator[tuple[tuple[int, int], float]]:
    values = image.get_array()
    if getattr(values, "ndim", 0) == 2:
        for row, cells in enumerate(values.tolist()):
            for column, value in enumerate(cells):
                if value is not None:
                    yield (row, column), value


def _at(axis: Any, value: float) -> str:
    """A value on an axis: in the words at its tick, or as a number beside the axis's name."""
    ticks = [float(tick) for tick in axis.get_ticklocs()]
    words: list[str] = [label.get_text() for label in axis.get_ticklabels()]
    found = dict(zip(ticks, words, strict=False)).get(float(value), "")
    if found and not _is_number(found):
        return found
    name = axis.get_label_text()
    return f"{name} {value:.4g}" if name else f"{value:.4g}"


def _is_number(text: str) -> bool:
    try:
        float(text.replace("\N{MINUS SIGN}", "-"))
    except ValueError:
        return "$" in text  # mathtext, of a logarithmic axis
    return True
