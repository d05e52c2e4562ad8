"""A neuron card as HTML that needs nothing else: no script, no file, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

from miner_lens.experiments.figures import COLOURS
from miner_lens.experiments.moments import Medium, Moment

if TYPE_CHECKING:
    import pandas as pd

# Marks are laid over the page's own colours, so that they suit light and dark pages. A report whose
# page has circuitsvis on it has that draw the tokens of a `data-most` again.
STYLE = """<style>
.miner-card { line-height: 1.5; overflow-wrap: anywhere; }
.miner-card .prompt { line-height: 2; white-space: pre-wrap; }
.miner-card .prompt span { border-bottom: 3px solid; padding: 0 1px; border-radius: 2px; }
.miner-card .peak { outline: 2px solid; outline-offset: 1px; font-weight: bold; }
.miner-card .media { display: flex; flex-wrap: wrap; gap: 1em; }
.miner-card svg { max-width: 100%; height: auto; }
.miner-card .columns { display: flex; flex-wrap: wrap; gap: 0 2em; align-items: flex-start; }
.miner-card h4 { margin: 1em 0 .3em; }
.miner-card table { border-collapse: collapse; }
.miner-card th, .miner-card td { padding: .1em .6em; text-align: right; white-space: nowrap; }
.miner-card .scroll { overflow-x: auto; max-width: 100%; }
</style>"""
# What is laid over a patch or stretch of sound; its opacity says how active the neuron is.
MARK = "230, 120, 0"
OTHER = "#999999"
SIDE = 160


class Card(Protocol):
    """What is shown of a neuron; `NeuronCard` says what each of it is."""

    @property
    def frame(self) -> pd.DataFrame: ...  # noqa: D102
    @property
    def info(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def layer(self) -> int: ...  # noqa: D102
    @property
    def neuron(self) -> int: ...  # noqa: D102
    @property
    def summary(self) -> str: ...  # noqa: D102
    @property
    def moments(self) -> list[Moment]: ...  # noqa: D102
    @property
    def promotes(self) -> list[tuple[str, float]]: ...  # noqa: D102
    @property
    def suppresses(self) -> list[tuple[str, float]]: ...  # noqa: D102
    @property
    def neighbours(self) -> list[tuple[int, int, float]]: ...  # noqa: D102
    @property
    def costs(self) -> list[Mapping[str, Any]]: ...  # noqa: D102


def card_html(card: Card) -> str:
    """The card, as a notebook or a report shows it."""
    name = f"Layer {card.layer}, neuron {card.neuron}"
    model = card.info["identity"]["name"]
    parts = [
        f'<div class="miner-card">{STYLE}<p><b>{name}</b> of {escape(str(model))}</p>',
        f"<p>{escape(card.summary)}</p>",
        "<h4>Scores</h4>",
        _scores(card),
        "<h4>What its output direction does in the vocabulary, and neurons most like it</h4>",
        '<div class="columns">',
        _table(["promotes", "logit"], [(repr(w), f"{v:+.2f}") for w, v in card.promotes]),
        _table(["suppresses", "logit"], [(repr(w), f"{v:+.2f}") for w, v in card.suppresses]),
        _table(
            ["layer", "neuron", "cosine"],
            [(str(layer), str(n), f"{cosine:.3f}") for layer, n, cosine in card.neighbours],
        ),
        "</div>",
    ]
    if card.costs:
        rows = [
            (
                str(row["label"] or "all"),
                str(row["measure"]),
                f"{row['cost']:z.3g}",
                f"[{row['low']:z.3g}, {row['high']:z.3g}]",
                str(row["samples"]),
            )
            for row in card.costs
        ]
        head = ["label", "measure", "cost", "95 % interval", "samples"]
        parts += ["<h4>Switched off alone</h4>", _table(head, rows)]
    moments = card.moments
    parts += ["<h4>Samples that fire it most</h4>", _legend(moments)]
    largest = max((one.value for one in moments), default=0.0)
    parts += [moment_html(one, largest) for one in moments]
    return "\n".join([*parts, "</div>"])


def moment_html(moment: Moment, largest: float) -> str:
    """A prompt with its tokens marked, and its pictures and sounds.

    Args:
        moment: The prompt.
        largest: The activation that is marked with full strength.
    """
    shares = [_share(value, largest) for value in moment.activations]
    under = f", label {moment.label}" if moment.label else ""
    at = f"{moment.modalities[moment.peak]} token {moment.peak}"
    head = f"{moment.sample}{under}: X up to {moment.value:.3f}, at {at}"
    media = [_medium(one, shares, moment.activations) for one in moment.media]
    shown = f'<div class="media">{"".join(media)}</div>' if media else ""
    words = "".join(_words(moment, shares))
    prompt = f'<p class="prompt" data-most="{max(0.0, largest):.4g}">{words}</p>'
    return f"<p><b>{escape(head)}</b></p>\n{shown}{prompt}"


def _legend(moments: Sequence[Moment]) -> str:
    kinds = dict.fromkeys(kind for one in moments for kind in one.modalities)
    names = " ".join(f'<span style="{_coloured(kind, 0.6)}">{kind}</span>' for kind in kinds)
    return (
        f'<p class="prompt">By modality: {names}; the fuller a token\'s colour, the more active is '
        'the neuron, most of all at the one that is <span class="peak">outlined</span>.</p>'
    )


def _words(moment: Moment, shares: Sequence[float]) -> Iterator[str]:
    """Tokens, coloured by modality; placeholders of one medium are told in a word."""
    told = {position: one for one in moment.media for position in one.positions}
    for position, token in enumerate(moment.tokens):
        kind, at, upto = moment.modalities[position], position, ""
        medium = told.get(position)
        if medium is not None:
            if position != medium.positions[0]:
                continue
            at = max(medium.positions, key=lambda one: moment.activations[one])
            token, upto = f"[{kind}: {len(medium.positions)} tokens]", "up to "
        value = moment.activations[at]
        mark = ' class="peak"' if at == moment.peak else ""
        yield (
            f'<span{mark} data-kind="{kind}" data-x="{value:z.4g}" '
            f'style="{_coloured(kind, 0.6 * shares[at])}" title="{kind}, {upto}X = {value:z.3f}">'
            f"{escape(_visible(token))}</span>"
        )


def _coloured(kind: str, opacity: float) -> str:
    """A modality's colour under a token, and behind it as full as is said."""
    colour = COLOURS.get(kind, OTHER)
    return f"border-color: {colour}; background: {colour}{round(255 * opacity):02x}"


def _visible(token: str) -> str:
    """A token of which something is seen, also where it is a line's end."""
    return token.replace("\n", "\u21b5\n")


def _medium(medium: Medium, shares: Sequence[float], values: Sequence[float]) -> str:
    most = max(medium.positions, key=lambda one: values[one])
    label = f"{medium.kind}: the neuron's activation over it, up to {values[most]:.3f}"
    if medium.kind == "audio":
        return _sound(medium, shares, label)
    if medium.grid is None:
        grid = (1, 1, len(medium.positions))
        return _patches(medium, grid, shares, values, f"{label}, in the order of its tokens")
    return _patches(medium, medium.grid, shares, values, label)


def _patches(
    medium: Medium,
    grid: tuple[int, int, int],
    shares: Sequence[float],
    values: Sequence[float],
    label: str,
) -> str:
    frames, rows, columns = grid
    cell = SIDE / max(rows, columns)
    width, height = frames * columns * cell, rows * cell
    drawn = []
    if medium.picture is not None:
        placed = f'width="{width:g}" height="{height:g}" preserveAspectRatio="none"'
        drawn.append(f'<image href="{medium.picture}" {placed}/>')
    for place, position in enumerate(medium.positions):
        frame, inside = divmod(place, rows * columns)
        row, column = divmod(inside, columns)
        x, y = (frame * columns + column) * cell, row * cell
        drawn.append(
            f'<rect x="{x:g}" y="{y:g}" width="{cell:g}" height="{cell:g}" '
            f'fill="rgb({MARK})" fill-opacity="{0.75 * shares[position]:.2f}" '
            f'stroke="#888" stroke-opacity="0.4">'
            f"<title>X = {values[position]:.3f}</title></rect>"
        )
    return _svg(width, height, label, drawn)


def _sound(medium: Medium, shares: Sequence[float], label: str) -> str:
    width, height = 480.0, 90.0
    step, drawn = width / len(medium.positions), []
    for place, position in enumerate(medium.positions):
        drawn.append(
            f'<rect x="{place * step:.2f}" width="{step:.2f}" height="{height:g}" '
            f'fill="rgb({MARK})" fill-opacity="{0.75 * shares[position]:.2f}"/>'
        )
    loudest = max(medium.outline, default=0.0) or 1.0
    points = [
        (width * (place + 0.5) / len(medium.outline), height / 2 * (1 - one / loudest))
        for place, one in enumerate(medium.outline)
    ]
    lower = [(x, height - y) for x, y in reversed(points)]
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*points, *lower))
    drawn.append(f'<polygon points="{outline}" fill="currentColor" fill-opacity="0.7"/>')
    return _svg(width, height, f"{label}, over {medium.seconds:.2f} s", drawn)


def _svg(width: float, height: float, label: str, drawn: Sequence[str]) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


def _scores(card: Card) -> str:
    """A row for each metric, a column for each modality or domain, each with its rank."""
    names = list(dict.fromkeys(card.frame["name"]))
    rows = []
    for metric, group in card.frame.groupby("metric", sort=False):
        cells = {one.name: f"{one.value:z.3g} (#{one.rank})" for one in group.itertuples()}
        rows.append((str(metric), *(cells.get(name, "") for name in names)))
    note = f"<p>In brackets the rank among all {card.info['neurons']} neurons.</p>"
    return _table(["", *names], rows) + note


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _share(value: float, largest: float) -> float:
    return max(0.0, min(1.0, value / largest)) if largest > 0 else 0.0
