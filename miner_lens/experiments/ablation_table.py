"""Is it modality-specific neurons, or any neurons? Sets, pairs and all, beside every control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Unpack

import torch

from miner_lens.experiments.figures import COLOURS, panels
from miner_lens.experiments.plan import (
    Ablation,
    Data,
    Options,
    Plan,
    Sets,
    Weights,
    frame_of,
    said,
    shown,
    weighted,
)
from miner_lens.experiments.result import Finding
from miner_lens.experiments.statistics import Comparison, against_controls
from miner_lens.experiments.table import Trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ALL = "all"
MSNS, RANDOM, MATCHED, BOTTOM, COMPLEMENT = (
    "MSNs",
    "random",
    "layer-matched",
    "bottom",
    "complement",
)


@dataclass(frozen=True, eq=False, repr=False)
class AblationTable(Finding):
    """What modality-specific neurons cost, beside what their controls cost.

    The table has a row for each label, measure and ablation: `off` (a modality, a pair, or all),
    `kind`, `neurons`, `seeds`, `samples`, `value`, `cost` (intact minus ablated, mean over samples
    and seeds) and `low`, `high`, a 95 % bootstrap interval over samples. Kinds are `MSNs`; `random`
    (as many neurons drawn from the model), `layer-matched` (as many in each layer) and `bottom` (as
    many in each layer, with the lowest scores of all modalities together); `complement` leaves
    only the neurons on that are off in the others. The intact model's kind is empty.
    """

    @property
    def comparisons(self) -> pd.DataFrame:
        """MSNs against their controls, as `statistics.against_controls` has them, with `off`.

        All are one family: `p_holm` is Holm's.
        """
        import pandas as pd

        return pd.DataFrame(self.info["comparisons"])

    @property
    def summary(self) -> str:
        """What all MSNs cost beside their controls, and which sets cost more than chance."""
        parts = []
        for label in self.frame["label"].unique():
            costs = {
                kind: shown(self.frame, label, "logprob", off=ALL, kind=kind)
                for kind in (MSNS, MATCHED, BOTTOM)
            }
            right = shown(self.frame, label, "correct", off=ALL, kind=MSNS)
            parts.append(
                f"On {label}, all {costs[MSNS]['neurons']} MSNs cost {said(right)} of the accuracy "
                f"and {said(costs[MSNS])} nats, as many random ones in each layer "
                f"{said(costs[MATCHED])}, those of the lowest scores {said(costs[BOTTOM])}"
            )
        table = self.comparisons
        beyond = table[(table["measure"] == "logprob") & table["beyond_chance"]]
        names = [f"{row.off} against {row.against} on {row.label}" for row in beyond.itertuples()]
        return (
            f"{'. '.join(parts)}. More than chance (Holm, {len(table)} comparisons, 5 %), of the "
            f"log-probability: {', '.join(names) or 'none'}."
        )

    def figure(self) -> Figure:
        """Costs in nats with their intervals, a panel for each label."""
        rows = self.frame[(self.frame["measure"] == "logprob") & (self.frame["kind"] != "")]
        labels = list(rows["label"].unique())
        found, axes = panels(len(labels))
        for panel, label in zip(axes, labels, strict=True):
            here = rows[rows["label"] == label].iloc[::-1]
            names = [f"{row.off}, {row.kind}" for row in here.itertuples()]
            colours = [
                COLOURS.get(row.off if row.kind == MSNS else row.kind, "#999999")
                for row in here.itertuples()
            ]
            reach = [here["cost"] - here["low"], here["high"] - here["cost"]]
            panel.barh(names, here["cost"], color=colours, xerr=reach, ecolor="black")
            _clip(panel, here)
            panel.set(title=f"asked: {label}", xlabel="log-probability lost (nats)")
            panel.grid(alpha=0.3, axis="x")
            panel.locator_params(axis="x", nbins=5)
        return found


def _clip(panel: Any, rows: pd.DataFrame) -> None:
    """Let the axis be that of the sets, where the complement costs many times as much."""
    others = rows[rows["kind"] != COMPLEMENT]
    low, high = min(0.0, float(others["low"].min())), float(others["high"].max())
    margin = 0.05 * (high - low)
    if margin <= 0:
        return
    for place, row in enumerate(rows.to_dict("records")):
        if row["kind"] == COMPLEMENT and row["high"] > high:
            panel.text(high, place, f"{said(row)} \N{RIGHTWARDS ARROW}", ha="right", va="center")
            panel.set_xlim(low - margin, high + margin)


def ablation_plan(
    scores: ImportanceScores,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Plan:
    """What `ablation_table` switches off.

    Raises:
        ValueError: As `select`, or there are no seeds.
    """
    if not seeds:
        raise ValueError("Controls need at least one seed.")
    chosen = scores.select(ratio, strategy, weights)
    everything = NeuronSet.union(chosen)
    sets = dict(chosen)
    if len(chosen) > 2:
        pairs = combinations(chosen, 2)
        sets |= {f"{one} + {other}": chosen[one] | chosen[other] for one, other in pairs}
    sets[ALL] = everything
    rows = [_row(off, MSNS, one) for off, one in sets.items()]
    for off in (*chosen, ALL):
        like = sets[off]
        rows.append(_row(off, RANDOM, [NeuronSet.random(len(like), like, n) for n in seeds]))
        rows.append(_row(off, MATCHED, [NeuronSet.random_like(like, n) for n in seeds]))
    total = weighted(scores, list(_scored(scores, chosen)), weights).sum(0)
    rows.append(_row(ALL, BOTTOM, _bottom(total, everything)))
    rows.append(_row(ALL, COMPLEMENT, everything, complement=True))
    return Plan(tuple(rows), tuple(seeds))


def read_ablation(table: Trials, plan: Plan) -> AblationTable:
    """The ablation table that finished trials of a plan amount to.

    Raises:
        ValueError: The table lacks a condition of the plan, or as `statistics.costs`.
    """
    frame = plan.costs(table).drop(columns="condition")
    msns = {row.about["off"]: row.name for row in plan.rows if row.about["kind"] == MSNS}
    offs, comparisons = [], []
    for row in plan.rows:
        kind = row.about["kind"]
        if kind in (RANDOM, MATCHED, BOTTOM):
            (condition,) = plan.groups[msns[row.about["off"]]]
            offs.append(row.about["off"])
            comparisons.append(Comparison(condition, kind, plan.groups[row.name]))
    compared = against_controls(frame_of(table), comparisons)
    # Of each label and measure, all comparisons in their order.
    compared.insert(1, "off", offs * (len(compared) // len(offs)))
    records = compared.drop(columns="condition").to_dict("records")
    return AblationTable(frame, plan.about(table) | {"comparisons": records})


def ablation_table(
    model: Any,
    data: Data,
    scores: ImportanceScores,
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    weights: Weights = None,
    seeds: Sequence[int] = (0, 1, 2),
    **options: Unpack[Options],
) -> AblationTable:
    """Switch off each modality's neurons, pairs and all, and the controls that reviewers ask for.

    Costs are paired by sample. The comparisons of MSNs with their controls are one family
    (`statistics.against_controls`). What `ml.trials` says of `ablation_plan(...).conditions` can be
    read again without a model, by `read_ablation`.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, other ones than were mined; their labels are kept apart.
        scores: What `ml.mine` returns.
        ratio: As for `select`.
        strategy: As for `select`.
        weights: As for `select`.
        seeds: Of the random controls, a condition for each.
        options: `batch_size`, `metric`, `checkpoint` and the others of `ml.trials`.

    Raises:
        ValueError: As `select` and `ml.trials`.

    Example:
        table = ml.experiments.ablation_table(model, data, scores)
        print(table.summary)
    """
    plan = ablation_plan(scores, ratio, strategy, weights, seeds)
    return read_ablation(plan.run(model, data, options), plan)


def _row(off: str, kind: str, sets: Sets, **how: Any) -> Ablation:
    return Ablation.of(f"{kind}, {off}", sets, {"off": off, "kind": kind}, **how)


def _scored(scores: ImportanceScores, chosen: Sequence[str] | Any) -> Sequence[str]:
    """The modalities whose scores count; of a random selection, all that occur."""
    named = [name for name in chosen if name in scores]
    pairs = zip(scores, scores.occurrences, strict=True)
    return named or [name for name, count in pairs if count]


def _bottom(total: torch.Tensor, like: NeuronSet) -> NeuronSet:
    """As many neurons in each layer as in a set, those of the lowest scores outside it."""
    mask = torch.zeros_like(like.mask)
    # A layer of which more than half is in the set has not as many outside.
    outside = total.cpu().masked_fill(like.mask | ~like.exists, torch.inf)
    for layer, count in enumerate(like.counts()):
        mask[layer, outside[layer].argsort(stable=True)[:count]] = True
    return NeuronSet.from_mask(mask, like.identity, like.means, like.site)
