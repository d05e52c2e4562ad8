"""Are the highest-scoring neurons necessary, and are they sufficient?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch

from miner_lens.experiments.figures import COLOURS, panels
from miner_lens.experiments.plan import (
    Ablation,
    Data,
    Options,
    Plan,
    Weights,
    frame_of,
    weighted,
)
from miner_lens.experiments.resampling import interval
from miner_lens.experiments.result import Finding
from miner_lens.experiments.statistics import MEASURES, averaged
from miner_lens.experiments.table import Trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

DELETION, INSERTION, RANDOM = "deletion", "insertion", "random"
FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False, repr=False)
class Necessity(Finding):
    """Deletion and insertion curves of neurons in the order of their scores.

    The table has a row for each label, measure, curve, ranking and fraction: `curve` (`deletion`:
    so many of the neurons are off, the highest-scoring first; `insertion`: only they are on),
    `ranking` (a modality, or `random`), `fraction`, `neurons` (off), `seeds`, `samples`, `value`,
    `cost` and its 95 % bootstrap interval `low`, `high`. The intact model is at fraction 0 of
    deletion and 1 of insertion.
    """

    @property
    def areas(self) -> pd.DataFrame:
        """The area under each curve: the measure's mean over fractions from 0 to 1 (trapezoids).

        By label, measure, curve and ranking: `area` with a 95 % bootstrap interval over samples,
        `low`, `high`, and its `difference` from that of random order with `difference_low`,
        `difference_high`. A small deletion area says that the neurons are necessary, a large
        insertion area that they are sufficient.
        """
        import pandas as pd

        return pd.DataFrame(self.info["areas"])

    @property
    def summary(self) -> str:
        """Which rankings are better than random order, by the areas of log-probability."""
        table = self.areas
        parts = []
        for label, rows in table[table["measure"] == "logprob"].groupby("label", sort=False):
            found = []
            for row in rows[rows["ranking"] != RANDOM].itertuples():
                text = (
                    f"{row.difference:z.2f} [{row.difference_low:z.2f}, {row.difference_high:z.2f}]"
                )
                found.append(f"{row.curve} by {row.ranking} {text}")
            parts.append(f"on {label}: {', '.join(found)}")
        return (
            "Area under the curve of log-probability (nats) beyond that of random order, where "
            "deletion below 0 says necessary and insertion above 0 sufficient, "
            f"{'; '.join(parts)}."
        )

    def figure(self) -> Figure:
        """Log-probability by fraction: deletion solid, insertion dashed; a panel for each label."""
        rows = self.frame[self.frame["measure"] == "logprob"]
        labels = list(rows["label"].unique())
        found, axes = panels(len(labels))
        for panel, label in zip(axes, labels, strict=True):
            here = rows[rows["label"] == label]
            for (curve, ranking), line in here.groupby(["curve", "ranking"], sort=False):
                panel.plot(
                    line["fraction"],
                    line["value"],
                    "-" if curve == DELETION else "--",
                    marker=".",
                    color=COLOURS.get(str(ranking)),
                    label=f"{curve}, {ranking}",
                )
            panel.set(title=f"asked: {label}", xlabel="fraction of neurons, highest scores first")
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("log-probability of the answer")
        axes[-1].legend(frameon=False, fontsize=7)
        return found


def necessity_plan(
    scores: ImportanceScores,
    modalities: Sequence[str] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    weights: Weights = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Plan:
    """What `necessity` switches off; of random order, the first so many of one permutation.

    Raises:
        ValueError: The fractions do not rise from 0 to 1, a modality was not scored, or as
            `select`.
    """
    if list(fractions) != sorted(set(fractions)) or not (
        len(fractions) > 1 and fractions[0] == 0 and fractions[-1] == 1
    ):
        raise ValueError(f"fractions must rise from 0 to 1, not {list(fractions)}.")
    if modalities is None:
        modalities = list(scores.select(1.0, "LA_MU", weights))
    if unknown := [name for name in modalities if name not in scores]:
        raise ValueError(
            f"There are no scores of {unknown[0]!r}; there are {', '.join(scores.modalities)}."
        )
    orders: dict[str, list[torch.Tensor]] = {
        name: [values.flatten().argsort(descending=True, stable=True)]
        for name, values in zip(modalities, weighted(scores, modalities, weights), strict=True)
    }
    nothing = NeuronSet([], layers=scores.layers, neurons=scores.neurons, identity=scores.identity)
    places = nothing.exists.flatten().nonzero()[:, 0]
    orders[RANDOM] = [
        places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
        for seed in seeds
    ]
    rows = []
    for ranking, several in orders.items():
        for curve in (DELETION, INSERTION):
            for fraction in fractions:
                count = round(fraction * scores.total)
                sets = [_first(order, count, nothing, curve == INSERTION) for order in several]
                name = f"{curve} by {ranking} at {fraction:.4g}"
                about = {"curve": curve, "ranking": ranking, "fraction": fraction}
                rows.append(Ablation.of(name, sets if len(sets) > 1 else sets[0], about))
    return Plan(tuple(rows), tuple(seeds))


def read_necessity(table: Trials, plan: Plan) -> Necessity:
    """The curves and areas that finished trials of a plan amount to.

    Raises:
        ValueError: The table lacks a condition of the plan, or as `statistics.costs`.
    """
    frame = plan.costs(table)
    frame = frame[frame["curve"] != ""].drop(columns="condition").reset_index(drop=True)
    joined = averaged(frame_of(table), plan.groups)
    about = {row.name: row.about for row in plan.rows}
    curves: dict[tuple[str, str], list[str]] = {}
    for name, one in about.items():
        curves.setdefault((one["curve"], one["ranking"]), []).append(name)
    fractions = [about[name]["fraction"] for name in next(iter(curves.values()))]
    records = []
    for label, rows in joined.groupby("label", sort=False):
        for measure in MEASURES:
            wide = rows.astype({measure: float}).pivot(
                index="sample", columns="condition", values=measure
            )
            areas = {key: area(wide[names].to_numpy(), fractions) for key, names in curves.items()}
            for (curve, ranking), own in areas.items():
                beyond = own - areas[curve, RANDOM]
                low, high = interval(np.stack([own, beyond]), 5000, 0)
                records.append(
                    {
                        "label": label,
                        "measure": measure,
                        "curve": curve,
                        "ranking": ranking,
                        "samples": len(own),
                        "area": float(own.mean()),
                        "low": float(low[0]),
                        "high": float(high[0]),
                        "difference": float(beyond.mean()),
                        "difference_low": float(low[1]),
                        "difference_high": float(high[1]),
                    }
                )
    return Necessity(frame, plan.about(table) | {"areas": records})


def area(values: Any, fractions: Sequence[float]) -> Any:
    """Under each row of values `[row fraction]`, by trapezoids.

    Example:
        >>> area(np.array([[1.0, 0.0, 0.0]]), [0.0, 0.5, 1.0]).tolist()
        [0.25]
    """
    return np.trapezoid(values, np.array(fractions), axis=-1)


def necessity(
    model: Any,
    data: Data,
    scores: ImportanceScores,
    modalities: Sequence[str] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    weights: Weights = None,
    seeds: Sequence[int] = (0, 1, 2),
    **options: Unpack[Options],
) -> Necessity:
    """Switch off more and more neurons in the order of their scores, or all but these.

    Deletion and insertion curves, as they are used of attributions (Petsiuk et al. 2018, arXiv
    1806.07421), over the neurons of the scores' site. Neurons are ranked over all layers by the
    weighted sum of their scores in one modality.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, other ones than were mined; their labels are kept apart.
        scores: What `ml.mine` returns.
        modalities: Whose scores to rank by; those that `select` tells apart if None.
        fractions: Of the neurons, rising from 0 to 1.
        weights: As for `select`.
        seeds: Of random orders, a curve for each.
        options: `batch_size`, `metric`, `checkpoint` and the others of `ml.trials`.

    Raises:
        ValueError: The fractions do not rise from 0 to 1, a modality was not scored, or as
            `ml.trials`.

    Example:
        found = ml.experiments.necessity(model, data, scores, ["image"])
        found.areas
    """
    plan = necessity_plan(scores, modalities, fractions, weights, seeds)
    return read_necessity(plan.run(model, data, options), plan)


def _first(order: torch.Tensor, count: int, like: NeuronSet, rest: bool) -> NeuronSet:
    """The first so many neurons in an order, or all others."""
    mask = like.exists & rest
    mask.view(-1)[order[:count].cpu()] = not rest
    return NeuronSet.from_mask(mask, like.identity, site=like.site)
