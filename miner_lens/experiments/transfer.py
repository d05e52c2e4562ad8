"""Do neurons that were mined on one data set count on another?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from miner_lens.experiments.figures import panels
from miner_lens.experiments.plan import Ablation, Item, Options, Plan, Sets, Weights, crossed, said
from miner_lens.experiments.result import Finding
from miner_lens.experiments.stability import jaccard
from miner_lens.experiments.table import Trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RANDOM = "random"


@dataclass(frozen=True, eq=False, repr=False)
class Transfer(Finding):
    """What the neurons of each data set cost on each data set.

    The table has a row for each data set that is asked (`label`), measure, and data set whose
    neurons are off (`mined`; `random`: as many as the largest set has): `neurons`, `seeds`,
    `samples`, `value`, `cost` and its 95 % bootstrap interval `low`, `high`. The intact model's
    `mined` is empty. `info["jaccard"]` says how much two sets share.
    """

    def matrix(self, measure: str = "logprob") -> pd.DataFrame:
        """Mean costs: a row for each data set that was mined, a column for each that is asked."""
        return crossed(self.frame, "mined", measure)

    @property
    def summary(self) -> str:
        """What each set costs at home, elsewhere, and what random neurons cost."""
        rows = self.frame[self.frame["measure"] == "logprob"].set_index(["mined", "label"])
        parts = []
        for label in rows.index.unique("label"):
            costs = [
                f"those of {mined} {said(rows.loc[mined, label])}"
                for mined in rows.index.unique("mined")
                if mined not in ("", RANDOM)
            ]
            parts.append(
                f"on {label} {', '.join(costs)}, random ones {said(rows.loc[RANDOM, label])}"
            )
        shared = ", ".join(
            f"{row['one']} and {row['other']} {row['jaccard']:.2f}" for row in self.info["jaccard"]
        )
        return f"Nats that neurons cost: {'; '.join(parts)}. Jaccard index of the sets: {shared}."

    def figure(self) -> Figure:
        """The matrix of costs in nats."""
        found, (panel,) = panels(1)
        table = self.matrix()
        image = panel.imshow(table.to_numpy(), aspect="auto")
        panel.set_xticks(range(table.shape[1]), table.columns)
        panel.set_yticks(range(table.shape[0]), table.index)
        panel.set(xlabel="asked", ylabel="mined on")
        for y, line in enumerate(table.to_numpy()):
            for x, value in enumerate(line):
                panel.text(x, y, f"{value:z.2f}", ha="center", va="center", color="white")
        found.colorbar(image, ax=panel, label="log-probability lost (nats)")
        return found


def transfer_plan(
    scores: Mapping[str, ImportanceScores],
    modality: str | None = None,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Iterable[int] = (0, 1, 2),
) -> Plan:
    """What `transfer` switches off.

    Raises:
        ValueError: There are fewer than two scores, or as `select`.
        KeyError: A data set has no neurons of the modality.
    """
    if len(scores) < 2:
        raise ValueError(
            f"Transfer needs scores of at least two data sets, by name; got {len(scores)}."
        )
    sets = {}
    for name, one in scores.items():
        chosen = one.select(ratio, strategy, weights)
        sets[name] = NeuronSet.union(chosen) if modality is None else chosen[modality]
    largest = max(sets.values(), key=len)
    seeds = tuple(seeds)
    draws = [NeuronSet.random(len(largest), largest, seed) for seed in seeds]
    every: dict[str, Sets] = {**sets, RANDOM: draws}
    rows = (Ablation.of(f"mined on {name}", one, {"mined": name}) for name, one in every.items())
    return Plan(tuple(rows), seeds)


def read_transfer(table: Trials, plan: Plan) -> Transfer:
    """The matrix that finished trials of a plan amount to.

    Raises:
        ValueError: The table lacks a condition of the plan, or as `statistics.costs`.
    """
    sets = [(row.about["mined"], row.conditions[0].neurons) for row in plan.rows]
    mined = [(name, one) for name, one in sets if name != RANDOM and isinstance(one, NeuronSet)]
    shared = [
        {"one": name, "other": other, "jaccard": jaccard(left, right)}
        for place, (name, left) in enumerate(mined)
        for other, right in mined[place + 1 :]
    ]
    frame = plan.costs(table).drop(columns="condition")
    return Transfer(frame, plan.about(table) | {"jaccard": shared})


def transfer(
    model: Any,
    data: Mapping[str, Iterable[Item]],
    scores: Mapping[str, ImportanceScores],
    modality: str | None = None,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Iterable[int] = (0, 1, 2),
    **options: Unpack[Options],
) -> Transfer:
    """Mine on one data set, switch off on another.

    Args:
        model: A `TransformerBridge` with a processor.
        data: By data set, samples with answers, other ones than were mined.
        scores: By data set, what `ml.mine` returns.
        modality: Whose neurons; those of all modalities together if None.
        ratio: As for `select`.
        strategy: As for `select`.
        weights: As for `select`.
        seeds: Of the random neurons, a condition for each.
        options: `batch_size`, `metric`, `checkpoint` and the others of `ml.trials`.

    Raises:
        ValueError: There are scores of fewer than two data sets, or as `select` and `ml.trials`.
        KeyError: A data set has no neurons of the modality.

    Example:
        sets = {name: ml.datasets.load(name, limit=80) for name in ("easy-vqa", "digits")}
        scores = {name: ml.mine(model, data[:40]) for name, data in sets.items()}
        found = ml.experiments.transfer(model, {n: d[40:] for n, d in sets.items()}, scores)
    """
    plan = transfer_plan(scores, modality, ratio, strategy, weights, seeds)
    return read_transfer(plan.run(model, data, options), plan)
