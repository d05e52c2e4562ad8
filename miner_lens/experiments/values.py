"""Does it matter what is written into neurons that are switched off?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from miner_lens.experiments.figures import panels
from miner_lens.experiments.plan import Ablation, Data, Options, Plan, Sets, Weights, said, shown
from miner_lens.experiments.result import Finding
from miner_lens.experiments.table import Trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.neurons.writing import Value
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL, MATCHED = "all", "layer-matched"
VALUES: tuple[Value, ...] = ("zero", "min", "mean")


@dataclass(frozen=True, eq=False, repr=False)
class AblationValues(Finding):
    """What neurons cost by the value that is written into them.

    The table has a row for each label, measure, set and value: `off` (a modality, `all` of them, or
    `layer-matched`: as many random neurons in each layer), `written` (the value), `neurons`,
    `seeds`, `samples`, `value` (of the measure), `cost` and its 95 % bootstrap interval `low`,
    `high`. The intact model's `written` is empty.
    """

    @property
    def summary(self) -> str:
        """What all MSNs and random neurons cost by each value."""
        parts = []
        written = [one for one in self.frame["written"].unique() if one]
        for label in self.frame["label"].unique():
            costs = []
            for value in written:
                msns, control = (
                    shown(self.frame, label, "logprob", off=off, written=value)
                    for off in (ALL, MATCHED)
                )
                costs.append(f"{value} {said(msns)} (random {said(control)})")
            parts.append(f"on {label}: {', '.join(costs)}")
        return f"Nats that all MSNs cost by what is written into them, {'; '.join(parts)}."

    def figure(self) -> Figure:
        """Costs in nats, bars for each value by set, a panel for each label."""
        rows = self.frame[(self.frame["measure"] == "logprob") & (self.frame["written"] != "")]
        labels, written = list(rows["label"].unique()), list(rows["written"].unique())
        found, axes = panels(len(labels))
        width = 0.8 / len(written)
        for panel, label in zip(axes, labels, strict=True):
            here = rows[rows["label"] == label]
            offs = list(here["off"].unique())
            for place, value in enumerate(written):
                bars = here[here["written"] == value]
                reach = [bars["cost"] - bars["low"], bars["high"] - bars["cost"]]
                at = [offs.index(off) + (place + 0.5) * width - 0.4 for off in bars["off"]]
                panel.bar(at, bars["cost"], width, label=value, yerr=reach)
            panel.set_xticks(range(len(offs)), offs, rotation=30, ha="right")
            panel.set_title(f"asked: {label}")
            panel.grid(alpha=0.3, axis="y")
        axes[0].set_ylabel("log-probability lost (nats)")
        axes[-1].legend(frameon=False, title="written")
        return found


def value_plan(
    scores: ImportanceScores,
    values: Sequence[Value] = VALUES,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Plan:
    """What `ablation_values` switches off.

    Raises:
        ValueError: As `select`, `mean` is asked for and the scores have no means, or no value.
    """
    if not values:
        raise ValueError("Name at least one value, such as 'zero'.")
    if "mean" in values and scores.means is None:
        raise ValueError(
            "The value 'mean' needs mined means, and these scores have none. Give values=('zero', "
            "'min'), or mine again."
        )
    chosen = scores.select(ratio, strategy, weights)
    everything = NeuronSet.union(chosen)
    draws = [NeuronSet.random_like(everything, seed) for seed in seeds]
    rows = []
    every: dict[str, Sets] = {**chosen, ALL: everything, MATCHED: draws}
    for off, sets in every.items():
        for value in values:
            about = {"off": off, "written": str(value)}
            rows.append(Ablation.of(f"{off}, {value} written", sets, about, value=value))
    return Plan(tuple(rows), tuple(seeds))


def read_values(table: Trials, plan: Plan) -> AblationValues:
    """What finished trials of a plan amount to.

    Raises:
        ValueError: The table lacks a condition of the plan, or as `statistics.costs`.
    """
    return AblationValues(plan.costs(table).drop(columns="condition"), plan.about(table))


def ablation_values(
    model: Any,
    data: Data,
    scores: ImportanceScores,
    values: Sequence[Value] = VALUES,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Sequence[int] = (0, 1, 2),
    **options: Unpack[Options],
) -> AblationValues:
    """Write zero, the minimum or the mined mean into neurons, and see what each costs.

    Zero takes a neuron's mean away too, on which the model relies; the mean takes only what
    varies. Where zero costs much and the mean little, the neurons carried a constant.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, other ones than were mined; their labels are kept apart.
        scores: What `ml.mine` returns.
        values: What is written, as `ml.ablate` takes it.
        ratio: As for `select`.
        strategy: As for `select`.
        weights: As for `select`.
        seeds: Of the layer-matched random neurons, a condition for each.
        options: `batch_size`, `metric`, `checkpoint` and the others of `ml.trials`.

    Raises:
        ValueError: As `select` and `ml.trials`, or `mean` is asked for and was not mined.

    Example:
        print(ml.experiments.ablation_values(model, data, scores).summary)
    """
    plan = value_plan(scores, values, ratio, strategy, weights, seeds)
    return read_values(plan.run(model, data, options), plan)
