"""Would other samples, or other data, have given the same neurons?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, cycle
from math import exp, lgamma
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from miner_lens.experiments.figures import COLOURS, panels
from miner_lens.experiments.result import Finding
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.selection import Selection

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

HALVES, FIRST, BETWEEN = "halves", "first samples", "data sets"
Parts = Sequence[ImportanceScores]


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Finding):
    """How much selections from different samples agree, beside what chance would give.

    The table has a row for each comparison and modality: `kind`, `data` (the data set, "" where
    there is one alone), `other` (the one that it is compared with), `samples`, `repeat`,
    `modality`, `neurons` (in the smaller set), `jaccard` (shared neurons over those in either set)
    and `chance` (its expectation for two random sets of these sizes).

    Of kind `"halves"`, the samples are split at random in two, and the selections of both halves
    are compared; `samples` is the size of the smaller half. Of kind `"data sets"`, a half of one
    data set is compared with a half of another, so that what falls short of halves of the same is
    due to the data and not to their number; modalities of both are compared. Of kind
    `"first samples"`, the selection of the first so many is compared with that of all, which they
    are part of: it rises to 1 by itself, and says from where on more samples change little.
    """

    def matrix(self, modality: str) -> pd.DataFrame:
        """Mean agreement of a modality's neurons, data set by data set; of itself, of its halves.

        Raises:
            KeyError: No data set selects for this modality.
        """
        here = self.frame[(self.frame["modality"] == modality) & (self.frame["kind"] != FIRST)]
        if here.empty:
            known = ", ".join(self.frame["modality"].unique())
            raise KeyError(f"No neurons were selected for {modality!r}; there are {known}.")
        names = here.loc[here["kind"] == HALVES, "data"].unique()
        found = here.pivot_table(index="data", columns="other", values="jaccard")
        found = found.reindex(index=names, columns=names)
        return found.combine_first(found.T).loc[names, names]

    @property
    def summary(self) -> str:
        """The agreement of halves, and of data sets, beside chance."""
        halves = self.frame[self.frame["kind"] == HALVES]
        repeats = self.frame["repeat"].max() + 1
        size = f"{halves['samples'].min()} samples or more each, {repeats} splits"
        said = (
            f"Jaccard index of the neurons that two halves of the samples select ({size}): "
            f"{_listed(halves)}."
        )
        between = self.frame[self.frame["kind"] == BETWEEN]
        if between.empty:
            return said
        return f"{said} Of a half of one data set and a half of another: {_listed(between)}."

    def figure(self) -> Figure:
        """Agreement with the selection of all by number of samples; halves as crosses.

        Of several data sets, the panel beside it has the agreement within and between them.
        """
        several = bool((self.frame["kind"] == BETWEEN).any())
        found, (panel, *beside) = panels(2 if several else 1)
        lines = dict(zip(self.frame["data"].unique(), cycle(("-", "--", "-.", ":"))))
        for (name, data), rows in self.frame.groupby(["modality", "data"], sort=False):
            colour = COLOURS.get(str(name))
            first = rows[rows["kind"] == FIRST]
            halves = rows[rows["kind"] == HALVES]
            label = f"{name}, {data}" if several else name
            panel.plot(first["samples"], first["jaccard"], lines[data], color=colour, label=label)
            panel.plot(halves["samples"], halves["jaccard"], "x", color=colour)
        panel.axhline(self.frame["chance"].mean(), color="black", linestyle=":", label="chance")
        panel.set(xlabel="samples", ylabel="Jaccard index (x: of two halves)", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize="small" if several else None)
        for other in beside:
            self._draw_pairs(other)
        return found

    def _draw_pairs(self, panel: Any) -> None:
        """Each pair of data sets, and each with itself, as a place on the x axis."""
        halves = self.frame[self.frame["kind"] != FIRST]
        pairs = list(dict.fromkeys(zip(halves["data"], halves["other"], strict=True)))
        for name, rows in halves.groupby("modality", sort=False):
            places = [pairs.index(pair) for pair in zip(rows["data"], rows["other"], strict=True)]
            panel.plot(places, rows["jaccard"], "x", color=COLOURS.get(str(name)), label=name)
        panel.axhline(halves["chance"].mean(), color="black", linestyle=":", label="chance")
        names = [one if one == other else f"{one}\n{other}" for one, other in pairs]
        panel.set_xticks(range(len(pairs)), names)
        panel.set(xlabel="halves of which data", xlim=(-0.5, len(pairs) - 0.5))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize="small")


def stability(
    parts: Parts | Mapping[str, Parts],
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Sequence[float] | Mapping[str, float] | None = None,
    repeats: int = 20,
    seed: int = 0,
) -> Stability:
    """Whether a selection depends on the samples and the data, from scores of parts of the data.

    Nothing is mined: scores add up, so those of parts give those of any union of them.

    Args:
        parts: Scores of parts of the data, each sample in one; the more parts, the finer. Or a
            mapping of data sets' names to those of each, to compare selections across them.
        ratio: As for `select`.
        strategy: As for `select`; `random` would compare a set with itself.
        weights: As for `select`.
        repeats: How many times to split the parts in halves at random.
        seed: Of the splits.

    Raises:
        ValueError: A data set has fewer than two parts, there is none, some samples of a data set
            lack a modality that others have, two data sets have none in common or are of different
            models, no split is asked for, or as `+` and `select`.

    Example:
        data = ml.datasets.load("easy-vqa", limit=400)
        parts = [ml.mine(model, data[n : n + 20]) for n in range(0, 400, 20)]
        print(ml.experiments.stability(parts).summary)
    """
    import pandas as pd

    sets = dict(parts) if isinstance(parts, Mapping) else {"": parts}
    if not sets:
        raise ValueError("Stability needs scores of at least one data set; the mapping is empty.")
    for name, some in sets.items():
        if len(some) < 2:
            of = f"the data set {name!r}" if name else "the data"
            raise ValueError(
                f"Stability needs scores of at least two parts of {of}; got {len(some)}."
            )
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}.")
    if strategy == "random":
        raise ValueError("The strategy 'random' asks no samples. Name one that selects by scores.")

    def selected(some: Parts) -> _Selected:
        together: ImportanceScores = sum(some[1:], some[0])
        return _Selected(together.samples, together.select(ratio, strategy, weights))

    draw = np.random.default_rng(seed)
    rows = []
    for name, some in sets.items():
        whole = selected(some)
        for count in range(1, len(some)):
            first = selected(some[:count])
            rows += _compared(FIRST, (name, name), first.samples, 0, first, whole)
    for repeat in range(repeats):
        halves = {name: tuple(map(selected, _split(some, draw))) for name, some in sets.items()}
        for name, (one, other) in halves.items():
            rows += _compared(HALVES, (name, name), _fewest(one, other), repeat, one, other)
        for (name, (one, _)), (second, (other, _)) in combinations(halves.items(), 2):
            rows += _compared(BETWEEN, (name, second), _fewest(one, other), repeat, one, other)
    info = {"ratio": ratio, "strategy": strategy, "seed": seed}
    return Stability(pd.DataFrame(rows), info)


def jaccard(one: NeuronSet, other: NeuronSet) -> float:
    """Shared neurons over those in either set; 1 of two empty sets.

    Example:
        >>> sets = [NeuronSet(p, layers=1, neurons=4) for p in ([(0, 0), (0, 1)], [(0, 1)])]
        >>> jaccard(*sets)
        0.5
    """
    either = len(one | other)
    return len(one & other) / either if either else 1.0


def expected_jaccard(one: int, other: int, total: int) -> float:
    """The expected Jaccard index of two random sets of these sizes, out of so many neurons.

    Raises:
        ValueError: A set is larger than the model.

    Example:
        >>> round(expected_jaccard(100, 100, 1000), 4)
        0.0529
    """
    if not 0 <= one <= total or not 0 <= other <= total:
        raise ValueError(f"Sets of {one} and {other} neurons do not fit into {total}.")
    if not one + other:
        return 1.0

    def log_choose(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    # Hypergeometric: so many of the second set's neurons lie in the first.
    return sum(
        exp(
            log_choose(one, hits) + log_choose(total - one, other - hits) - log_choose(total, other)
        )
        * hits
        / (one + other - hits)
        for hits in range(max(0, one + other - total), min(one, other) + 1)
    )


class _Selected(NamedTuple):
    """What so many samples select."""

    samples: int
    neurons: Selection


def _split(parts: Parts, draw: np.random.Generator) -> tuple[Parts, Parts]:
    """Parts of the data, at random in two."""
    order, middle = draw.permutation(len(parts)), len(parts) // 2
    return [parts[i] for i in order[:middle]], [parts[i] for i in order[middle:]]


def _fewest(*some: _Selected) -> int:
    return min(one.samples for one in some)


def _listed(frame: pd.DataFrame) -> str:
    """The agreement of each modality and pair of data sets, for a sentence."""
    said = []
    for (name, one, other), rows in frame.groupby(["modality", "data", "other"], sort=False):
        where = one if one == other else f"{one} and {other}"
        values = rows["jaccard"]
        said.append(
            f"{name}{f' in {where}' if where else ''} {values.mean():.2f} ({values.min():.2f} to "
            f"{values.max():.2f}; by chance {rows['chance'].mean():.3f})"
        )
    return ", ".join(said)


def _compared(
    kind: str, data: tuple[str, str], samples: int, repeat: int, one: _Selected, other: _Selected
) -> list[dict[str, object]]:
    """A row for each modality that both select for."""
    names = [name for name in one.neurons if name in other.neurons]
    if kind != BETWEEN and list(one.neurons) != list(other.neurons):
        raise ValueError(
            f"Some samples select for {', '.join(one.neurons)} and others for "
            f"{', '.join(other.neurons)}: a modality is in some parts alone. Give larger parts, or "
            "mix the samples."
        )
    if not names:
        raise ValueError(
            f"{data[0]!r} selects for {', '.join(one.neurons)} and {data[1]!r} for "
            f"{', '.join(other.neurons)}: they have no modality in common."
        )
    rows: list[dict[str, object]] = []
    for name in names:
        left, right = one.neurons[name], other.neurons[name]
        row = {"kind": kind, "data": data[0], "other": data[1], "samples": samples}
        row |= {"repeat": repeat, "modality": name}
        sizes = (len(left), len(right))
        chance = expected_jaccard(*sizes, left.total)
        values = {"neurons": min(sizes), "jaccard": jaccard(left, right), "chance": chance}
        rows.append(row | values)
    return rows
