"""Would other samples have given the same neurons?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, lgamma
from typing import TYPE_CHECKING

import numpy as np

from miner_lens.experiments.figures import COLOURS, panels
from miner_lens.experiments.result import Finding
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.selection import Selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALVES, FIRST = "halves", "first samples"


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Finding):
    """How much selections from different samples agree, beside what chance would give.

    The table has a row for each comparison and modality: `kind`, `samples`, `repeat`, `modality`,
    `neurons` (in the smaller set), `jaccard` (shared neurons over those in either set) and
    `chance` (its expectation for two random sets of these sizes).

    Of kind `"halves"`, the samples are split at random in two, and the selections of both halves
    are compared; `samples` is the size of the smaller half. Of kind `"first samples"`, the
    selection of the first so many is compared with that of all, which they are part of: it rises to
    1 by itself, and says from where on more samples change little.
    """

    @property
    def summary(self) -> str:
        """The agreement of halves, beside chance."""
        parts = []
        for name, rows in self.frame[self.frame["kind"] == HALVES].groupby("modality", sort=False):
            values = rows["jaccard"]
            parts.append(
                f"{name} {values.mean():.2f} ({values.min():.2f} to {values.max():.2f}; by chance "
                f"{rows['chance'].mean():.3f})"
            )
        half = int(self.frame.loc[self.frame["kind"] == HALVES, "samples"].min())
        repeats = self.frame["repeat"].max() + 1
        return (
            f"Jaccard index of the neurons that two halves of the samples select ({half} samples "
            f"or more each, {repeats} splits): {', '.join(parts)}."
        )

    def figure(self) -> Figure:
        """Agreement with the selection of all by number of samples; halves as crosses."""
        found, (panel,) = panels(1)
        for name, rows in self.frame.groupby("modality", sort=False):
            colour = COLOURS.get(str(name))
            first = rows[rows["kind"] == FIRST]
            halves = rows[rows["kind"] == HALVES]
            panel.plot(first["samples"], first["jaccard"], color=colour, label=name)
            panel.plot(halves["samples"], halves["jaccard"], "x", color=colour)
        panel.axhline(self.frame["chance"].mean(), color="black", linestyle=":", label="chance")
        panel.set(xlabel="samples", ylabel="Jaccard index (x: of two halves)", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
        return found


def stability(
    parts: Sequence[ImportanceScores],
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Sequence[float] | Mapping[str, float] | None = None,
    repeats: int = 20,
    seed: int = 0,
) -> Stability:
    """Whether a selection depends on the samples, from scores of parts of the data.

    Nothing is mined: scores add up, so those of parts give those of any union of them.

    Args:
        parts: Scores of parts of the data, each sample in one; the more parts, the finer.
        ratio: As for `select`.
        strategy: As for `select`; `random` would compare a set with itself.
        weights: As for `select`.
        repeats: How many times to split the parts in halves at random.
        seed: Of the splits.

    Raises:
        ValueError: There are fewer than two parts, some samples lack a modality that others have,
            no split is asked for, or as `+` and `select`.

    Example:
        data = ml.datasets.load("easy-vqa", limit=400)
        parts = [ml.mine(model, data[n : n + 20]) for n in range(0, 400, 20)]
        print(ml.experiments.stability(parts).summary)
    """
    import pandas as pd

    if len(parts) < 2:
        raise ValueError(
            f"Stability needs scores of at least two parts of the data; got {len(parts)}."
        )
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}.")
    if strategy == "random":
        raise ValueError("The strategy 'random' asks no samples. Name one that selects by scores.")

    def selected(some: Sequence[ImportanceScores]) -> tuple[int, Selection]:
        together: ImportanceScores = sum(some[1:], some[0])
        return together.samples, together.select(ratio, strategy, weights)

    _, whole = selected(parts)
    draw = np.random.default_rng(seed)
    rows = []
    for count in range(1, len(parts)):
        samples, first = selected(parts[:count])
        rows += _compared(FIRST, samples, 0, first, whole)
    for repeat in range(repeats):
        order = draw.permutation(len(parts))
        middle = len(parts) // 2
        halves = [selected([parts[i] for i in some]) for some in (order[:middle], order[middle:])]
        (one, left), (other, right) = halves
        rows += _compared(HALVES, min(one, other), repeat, left, right)
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


def _compared(
    kind: str, samples: int, repeat: int, one: Selection, other: Selection
) -> list[dict[str, object]]:
    if list(one) != list(other):
        raise ValueError(
            f"Some samples select for {', '.join(one)} and others for {', '.join(other)}: a "
            "modality is in some parts alone. Give larger parts, or mix the samples."
        )
    rows: list[dict[str, object]] = []
    for name in one:
        left, right = one[name], other[name]
        row = {"kind": kind, "samples": samples, "repeat": repeat, "modality": name}
        sizes = (len(left), len(right))
        chance = expected_jaccard(*sizes, left.total)
        values = {"neurons": min(sizes), "jaccard": jaccard(left, right), "chance": chance}
        rows.append(row | values)
    return rows
