"""Which modality's neurons hurt which input modality? A matrix, and one index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from miner_lens.experiments.figures import panels
from miner_lens.experiments.plan import (
    INTACT,
    Ablation,
    Item,
    Options,
    Plan,
    Sets,
    Weights,
    crossed,
    frame_of,
)
from miner_lens.experiments.resampling import contrast, contrast_interval
from miner_lens.experiments.result import Finding
from miner_lens.experiments.statistics import MEASURES
from miner_lens.experiments.table import Trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RANDOM = "random"


def same_question(sample: str) -> str:
    """A sample's id without its last part, which in the shipped data sets says how it is asked.

    Example:
        >>> same_question("easy-vqa/test/7/image") == same_question("easy-vqa/test/7/text")
        True
    """
    return sample.rpartition("/")[0]


@dataclass(frozen=True, eq=False, repr=False)
class Specificity(Finding):
    """What each modality's neurons cost in questions asked through each input modality.

    The table has a row for each input modality (`label`), measure and set: `off`, `neurons`,
    `seeds`, `samples`, `value`, `cost` and its 95 % bootstrap interval `low`, `high`. Beside the
    modalities' sets there is `random`, as many neurons as the largest of them has; the intact
    model's `off` is empty.

    The index is (own - other) / (own + other): what modalities' neurons cost on average in
    questions asked through their own modality, and through the others. 1: they hurt only their own;
    0: all alike; -1: only others. A mean cost below 0, where answers become better, counts as
    nothing lost; where neither is above 0 the index is 0.
    """

    @property
    def index(self) -> pd.DataFrame:
        """By measure: `own`, `other`, `index`, its interval `low`, `high`, and `questions`.

        The interval is a 95 % percentile bootstrap interval over questions.
        """
        import pandas as pd

        return pd.DataFrame(self.info["index"])

    def matrix(self, measure: str = "logprob") -> pd.DataFrame:
        """Mean costs: a row for each set that is off, a column for each input modality."""
        return crossed(self.frame, "off", measure)

    @property
    def summary(self) -> str:
        """The index with its interval, and what it says."""
        row = self.index.set_index("measure").loc["logprob"]
        verdict = "not shown to be specific"
        if row["low"] > 0:
            verdict = "specific"
        elif row["high"] < 0:
            verdict = "they hurt other modalities more than their own"
        return (
            f"The neurons of {', '.join(self.info['modalities'])} cost {row['own']:z.3f} nats in "
            f"questions asked through their own modality and {row['other']:z.3f} through others: "
            f"specificity index {row['index']:z.2f} [{row['low']:z.2f}, {row['high']:z.2f}] over "
            f"{row['questions']:.0f} questions, {verdict}."
        )

    def figure(self) -> Figure:
        """The matrix of costs in nats."""
        found, (panel,) = panels(1)
        table = self.matrix()
        bound = float(np.abs(table.to_numpy()).max()) or 1.0
        image = panel.imshow(table.to_numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound)
        panel.set_xticks(range(table.shape[1]), table.columns)
        panel.set_yticks(range(table.shape[0]), table.index)
        panel.set(xlabel="asked", ylabel="off")
        for y, line in enumerate(table.to_numpy()):
            for x, value in enumerate(line):
                colour = "white" if abs(value) > 0.6 * bound else "black"
                panel.text(x, y, f"{value:z.2f}", ha="center", va="center", color=colour)
        found.colorbar(image, ax=panel, label="log-probability lost (nats)")
        return found


def specificity_plan(
    scores: ImportanceScores,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Iterable[int] = (0, 1, 2),
) -> Plan:
    """What `specificity` switches off.

    Raises:
        ValueError: As `select`.
    """
    chosen = scores.select(ratio, strategy, weights)
    largest = max(chosen.values(), key=len)
    seeds = tuple(seeds)
    draws = [NeuronSet.random(len(largest), largest, seed) for seed in seeds]
    sets: dict[str, Sets] = {**chosen, RANDOM: draws}
    rows = [Ablation.of(f"{off} off", one, {"off": off}) for off, one in sets.items()]
    return Plan(tuple(rows), seeds)


def read_specificity(
    table: Trials, plan: Plan, question: Callable[[str], str] = same_question
) -> Specificity:
    """The matrix and the index that finished trials of a plan amount to.

    Args:
        table: Trials whose labels are the input modalities.
        plan: What was switched off.
        question: Makes a name of the question of a sample's id, the same through every modality.

    Raises:
        ValueError: Fewer than two of the plan's modalities are labels of the table, the labels
            share no question, or as `statistics.costs`.
    """
    frame = plan.costs(table).drop(columns="condition")
    labels = list(frame["label"].unique())
    own = [
        (plan.groups[row.name][0], row.about["off"])
        for row in plan.rows
        if row.about["off"] in labels
    ]
    if len(own) < 2:
        raise ValueError(
            "Specificity needs the same questions through at least two modalities whose neurons "
            f"were selected; the labels are {', '.join(map(str, labels))}, the neurons those of "
            f"{', '.join(row.about['off'] for row in plan.rows if row.about['off'] != RANDOM)}. "
            "Give data as a mapping, {'image': ..., 'text': ...}."
        )
    records = []
    for measure in MEASURES:
        here, there = _lost(frame_of(table), own, measure, question)
        low, high = contrast_interval(here, there)
        values = {
            "own": here.mean(),
            "other": there.mean(),
            "index": contrast(here, there),
        }
        floats = {name: float(value) for name, value in values.items()}
        counted = {"low": low, "high": high, "questions": len(here)}
        records.append({"measure": measure, **floats, **counted})
    info = {"index": records, "modalities": [label for _, label in own]}
    return Specificity(frame, plan.about(table) | info)


def _lost(
    table: pd.DataFrame,
    own: Sequence[tuple[str, str]],
    measure: str,
    question: Callable[[str], str],
) -> tuple[Any, Any]:
    """By question, what is lost through the modality whose neurons are off, and through others."""
    lost: dict[Any, Any] = {}
    for label, rows in table.astype({measure: float}).groupby("label", sort=False):
        wide = rows.pivot(index="sample", columns="condition", values=measure)
        names = wide.index.map(question)
        if names.has_duplicates:
            twice = names[names.duplicated()][0]
            raise ValueError(f"Question {twice!r} is asked twice in {label!r}; it must be unique.")
        lost[label] = wide.rsub(wide[INTACT], axis=0).set_axis(names)
    indices = [one.index for one in lost.values()]
    shared = reduce(lambda one, other: one.intersection(other), indices)
    if len(shared) < 2:
        raise ValueError(
            f"The labels share {len(shared)} questions; their ids begin with "
            f"{', '.join(repr(one[0]) for one in indices)}. `question` must make the same name of "
            "a sample's id through every modality, and two questions are the least."
        )
    here = [lost[label].loc[shared, condition] for condition, label in own]
    there = [
        sum(lost[other].loc[shared, condition] for other in lost if other != label)
        / (len(lost) - 1)
        for condition, label in own
    ]
    return np.mean(here, axis=0), np.mean(there, axis=0)


def specificity(
    model: Any,
    data: Mapping[str, Iterable[Item]],
    scores: ImportanceScores,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Iterable[int] = (0, 1, 2),
    question: Callable[[str], str] = same_question,
    **options: Unpack[Options],
) -> Specificity:
    """Ask the same questions through each modality, with each modality's neurons off.

    Args:
        model: A `TransformerBridge` with a processor.
        data: By input modality, the same questions asked through it; other ones than were mined.
        scores: What `ml.mine` returns, of data that have all these modalities.
        ratio: As for `select`.
        strategy: As for `select`.
        weights: As for `select`.
        seeds: Of the random neurons, a condition for each.
        question: Makes a name of the question of a sample's id, the same through every modality.
        options: `batch_size`, `metric`, `checkpoint` and the others of `ml.trials`.

    Raises:
        ValueError: Fewer than two of the modalities have neurons, they share no question, or as
            `select` and `ml.trials`.

    Example:
        asked = {ask: ml.datasets.load("easy-vqa", limit=48, ask=ask) for ask in ("image", "text")}
        print(ml.experiments.specificity(model, asked, scores).summary)
    """
    plan = specificity_plan(scores, ratio, strategy, weights, seeds)
    return read_specificity(plan.run(model, data, options), plan, question)
