"""The report: results on one page that needs nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miner_lens.installed import versions
from miner_lens.reporting import circuitsvis
from miner_lens.reporting.drawing import svg
from miner_lens.reporting.sections import TEXT, Section, section

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# A longer table is cut, and says so.
MOST_ROWS = 500
# From so many rows on, a table can be searched.
SEARCHABLE = 12
# Nothing is loaded from anywhere, whatever a result says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def report(
    results: Mapping[str, Any] | Sequence[Any],
    path: str | os.PathLike[str],
    title: str = "miner-lens report",
) -> Path:
    """Write results to one HTML file that opens from disk, without a network.

    It says what was run, in plain words what came out, what the data cannot say, and shows each
    result: its table, which sorts, its figure, and neurons over tokens, patches and sounds. Tokens
    are drawn by circuitsvis where it is installed (`pip install miner-lens[demo]`), whose script is
    then part of the page, 1.3 MB.

    Args:
        results: Results by name, or a list of them: what `mine`, `select`, `run`, `trials`, `card`
            and `ml.experiments` return, tables of pandas and figures of matplotlib; text is said
            line by line among the plain words.
        path: The file to write; its folder is made.
        title: The page's heading.

    Returns:
        The path.

    Raises:
        ValueError: There are no results.
        TypeError: One of them is nothing that can be shown.
        IsADirectoryError: The path is a folder.
        ImportError: matplotlib is missing.

    Example:
        ml.report({"scores": scores, "neurons": msns, "trials": table}, "report.html")
    """
    if not isinstance(results, Mapping):
        names = [f"{n}. {type(one).__name__}" for n, one in enumerate(results, 1)]
        results = dict(zip(names, results, strict=True))
    if not results:
        raise ValueError("There are no results to report: give at least one.")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file for the report.")
    page = _page(title, [section(str(name), one) for name, one in results.items()])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _page(title: str, sections: Sequence[Section]) -> str:
    assets = resources("miner_lens.reporting")
    style, script = ((assets / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    shown = {n: one for n, one in enumerate(sections) if one.kind != TEXT}
    links = "".join(
        f'<li><a href="#result-{n}">{escape(one.name)}</a></li>' for n, one in shown.items()
    )
    said = {one.name: one.sentences for one in sections}
    left_open = {one.name: one.limits for one in sections}
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body>",
        '<a class="skip" href="#main">Skip to the results</a>',
        f"<header><h1>{escape(title)}</h1></header>",
        f'<nav aria-label="Results"><ul>{links}</ul></nav><main id="main">',
        "<h2>In plain words</h2>",
        _by_name(said),
        "<h2>What the data cannot say</h2>",
        _by_name(left_open, "limits"),
        "<h2>What was run</h2>",
        _what_was_run(sections),
    ]
    for number, one in shown.items():
        parts += _section(number, one)
    if drawing := _drawing(sections):
        parts.append(f"<script>{drawing}</script>")
    return "\n".join([*parts, f"</main><script>{script}</script></body></html>\n"])


def _drawing(sections: Sequence[Section]) -> str:
    """The script that draws tokens, where there are any."""
    return circuitsvis.bundle() if any(one.html for one in sections) else ""


def _by_name(said: Mapping[str, Sequence[str]], kind: str = "said") -> str:
    """What is said of each result."""
    items = "".join(
        f"<li>{escape(name)}: {escape(some[0])}</li>"
        if len(some) == 1
        else f"<li>{escape(name)}:{_list(some)}</li>"
        for name, some in said.items()
        if some
    )
    return f'<ul class="{kind}">{items}</ul>' if items else "<p>Nothing that was computed.</p>"


def _list(sentences: Sequence[str], kind: str = "said") -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{kind}">{items}</ul>'


def _what_was_run(sections: Sequence[Section]) -> str:
    import pandas as pd

    rows = [{"result": one.name, "kind": one.kind, **one.run} for one in sections if one.run]
    table = pd.DataFrame(rows or [{"result": one.name, "kind": one.kind} for one in sections])
    first = ["result", "kind", "model", "data", "samples", "seed", "seeds"]
    table = table[
        [*(one for one in first if one in table), *table.columns.difference(first, False)]
    ]
    known = versions()
    if _drawing(sections):
        known["circuitsvis"] = f"{circuitsvis.version()} (MIT licence), which draws tokens"
    here = ", ".join(f"{name} {version}" for name, version in known.items())
    note = f"<p>This page was written with {escape(here)}.</p>"
    return _table("run", "Results", table.astype(object).where(table.notna(), "")) + note


def _section(number: int, one: Section) -> Iterator[str]:
    yield f'<section aria-labelledby="result-{number}">'
    yield f'<h2 id="result-{number}">{escape(one.name)}</h2>'
    if one.sentences and not one.html:
        yield f"<p>{escape(' '.join(one.sentences))}</p>"
    for place, (caption, figure) in enumerate(one.figures.items()):
        yield _figure(f"f{number}-{place}", f"{one.name}: {caption}", figure)
    if one.html:
        yield f"<details open><summary>The neuron's card</summary>{one.html}</details>"
    for place, (caption, table) in enumerate(one.tables.items()):
        yield _table(f"t{number}-{place}", caption, table)
    if one.limits:
        yield _list(one.limits, "limits")
    yield "</section>"


def _table(name: str, caption: str, table: pd.DataFrame) -> str:
    shown = table.head(MOST_ROWS)
    more = len(table) - len(shown)
    if more:
        caption += f" (the first {MOST_ROWS} of {len(table)} rows)"
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(str(head))}</button></th>'
        for head in shown.columns
    )
    body = "\n".join(
        "<tr>" + "".join(map(_cell, row)) + "</tr>" for row in shown.itertuples(index=False)
    )
    words = escape(caption)
    search = (
        f'<label class="filter">Rows with <input type="search" data-table="{name}"></label>'
        if len(shown) > SEARCHABLE
        else ""
    )
    return (
        f'{search}<div class="scroll" role="region" tabindex="0" aria-label="{words}">'
        f'<table class="sortable" id="{name}"><caption>{words}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None or value != value:
        return '<td class="number" data-value="NaN"></td>'
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return f"<td>{escape(str(value))}</td>"
    number = float(value)
    whole = not math.isfinite(number) or number.is_integer()
    text = str(value) if whole else f"{number:z.4g}"
    return f'<td class="number" data-value="{number}">{escape(text)}</td>'


def _figure(name: str, caption: str, figure: Figure) -> str:
    words = escape(caption)
    drawn = svg(name, words, figure)
    return (
        f'<figure class="figure" tabindex="0" role="region" aria-label="{words}">'
        f"{drawn}<figcaption>{words}<output></output></figcaption></figure>"
    )
