"""At which ratios do modality-specific neurons cost more than random ones?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from miner_lens.experiments.figures import COLOURS, panels
from miner_lens.experiments.plan import Ablation, Data, Options, Plan, Sets, Weights, said, shown
from miner_lens.experiments.result import Finding
from miner_lens.experiments.table import Trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL, RANDOM = "all", "random"
RATIOS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True, eq=False, repr=False)
class RatioSweep(Finding):
    """What is lost by how many neurons.

    The table has a row for each label, measure, ratio and set: `off` (a modality, `all` of them, or
    `random`: as many as all), `neurons`, `seeds`, `samples`, `value`, `cost` and its 95 % bootstrap
    interval `low`, `high`. The intact model is at ratio 0, with `off` empty.
    """

    @property
    def summary(self) -> str:
        """From which ratio on all MSNs cost more than random ones do, interval above interval."""
        parts = []
        for label, rows in self.frame.groupby("label", sort=False):
            ratios = [ratio for ratio in rows["ratio"].unique() if ratio]
            pairs = [
                (
                    ratio,
                    *(
                        shown(rows, str(label), "logprob", ratio=ratio, off=off)
                        for off in (ALL, RANDOM)
                    ),
                )
                for ratio in ratios
            ]
            apart = [ratio for ratio, one, other in pairs if one["low"] > other["high"]]
            ratio, most, beside = pairs[-1]
            parts.append(
                f"on {label}, all MSNs cost more nats than as many random neurons, interval above "
                f"interval, at {', '.join(f'{one:.2%}' for one in apart) or 'no ratio'} of "
                f"{len(ratios)} tried; at {ratio:.2%} they cost {said(most)} and random ones "
                f"{said(beside)}"
            )
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}."

    def figure(self) -> Figure:
        """Costs in nats by ratio with their intervals, a panel for each label."""
        rows = self.frame[(self.frame["measure"] == "logprob") & (self.frame["ratio"] > 0)]
        labels = list(rows["label"].unique())
        found, axes = panels(len(labels))
        for panel, label in zip(axes, labels, strict=True):
            for off, line in rows[rows["label"] == label].groupby("off", sort=False):
                colour = COLOURS.get(str(off))
                panel.plot(line["ratio"], line["cost"], marker="o", color=colour, label=off)
                panel.fill_between(
                    line["ratio"], line["low"], line["high"], color=colour, alpha=0.2
                )
            panel.set(title=f"asked: {label}", xlabel="share of neurons off", xscale="log")
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("log-probability lost (nats)")
        axes[-1].legend(frameon=False)
        return found


def ratio_plan(
    scores: ImportanceScores,
    ratios: Sequence[float] = RATIOS,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Plan:
    """What `ratio_sweep` switches off; ratios of less than a neuron of each modality are left out.

    Raises:
        ValueError: As `select`, or no ratio is left.
    """
    groups = len(scores.select(1.0, "LA_MU", weights))
    rows = []
    for ratio in ratios:
        # Uniform strategies need a neuron of each modality in each layer.
        least = groups * (scores.layers if strategy in ("uniform", "LU_MA") else 1)
        if int(ratio * scores.total) < least:
            continue
        chosen = scores.select(ratio, strategy, weights)
        everything = NeuronSet.union(chosen)
        draws = [NeuronSet.random(len(everything), everything, seed) for seed in seeds]
        every: dict[str, Sets] = {**chosen, ALL: everything, RANDOM: draws}
        for off, sets in every.items():
            rows.append(Ablation.of(f"{off} at {ratio:.3%}", sets, {"off": off, "ratio": ratio}))
    if not rows:
        raise ValueError(
            f"Of {scores.total} neurons, no ratio of {', '.join(map(str, ratios))} leaves one for "
            "each modality. Give larger ratios."
        )
    return Plan(tuple(rows), tuple(seeds))


def read_ratios(table: Trials, plan: Plan) -> RatioSweep:
    """The sweep that finished trials of a plan amount to.

    Raises:
        ValueError: The table lacks a condition of the plan, or as `statistics.costs`.
    """
    return RatioSweep(plan.costs(table).drop(columns="condition"), plan.about(table))


def ratio_sweep(
    model: Any,
    data: Data,
    scores: ImportanceScores,
    ratios: Sequence[float] = RATIOS,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Sequence[int] = (0, 1, 2),
    **options: Unpack[Options],
) -> RatioSweep:
    """Switch off more and more neurons, of each modality, of all, and at random.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, other ones than were mined; their labels are kept apart.
        scores: What `ml.mine` returns.
        ratios: Shares of the model's neurons; 0.05 % to 20 %.
        strategy: As for `select`.
        weights: As for `select`.
        seeds: Of the random neurons, a condition for each.
        options: `batch_size`, `metric`, `checkpoint` and the others of `ml.trials`.

    Raises:
        ValueError: As `select` and `ml.trials`, or no ratio leaves a neuron for each modality.

    Example:
        sweep = ml.experiments.ratio_sweep(model, data, scores, ratios=[0.01, 0.02, 0.05])
        sweep.figure().savefig("ratios.png")
    """
    plan = ratio_plan(scores, ratios, strategy, weights, seeds)
    return read_ratios(plan.run(model, data, options), plan)
