"""Which metric and strategy finds the neurons that are known to carry a modality?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miner_lens.analyzers.attribution import METRIC as ATTRIBUTION
from miner_lens.analyzers.attribution import AttributionAnalyzer
from miner_lens.analyzers.importance import ImportanceAnalyzer
from miner_lens.data.sample import Sample
from miner_lens.experiments.figures import panels
from miner_lens.experiments.result import Finding
from miner_lens.models.bridge import unwrap, wrap
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.organisms import planted
from miner_lens.organisms.planting import CASES, Planting
from miner_lens.running.run import run
from miner_lens.scoring.kernels import ALL_METRICS
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.select import STRATEGIES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# MINER's weighted sum of metrics.
PUBLISHED = "published"
SEEDS = (0, 1, 2)


@dataclass(frozen=True, eq=False, repr=False)
class Recovery(Finding):
    """How much of what was planted each metric and strategy finds.

    The table has a row for each planted model (`case`, `seed`), `metric` (`published` is MINER's
    weighted sum), `strategy` and `modality`: `planted` (K, the number of neurons to be found),
    `selected` (as many under most strategies, of which each gets a budget of K for each modality),
    `precision` (the share of the selected that were planted; 0 of none) and `recall` (the share of
    the planted that were selected).
    """

    @property
    def means(self) -> pd.DataFrame:
        """Precision and recall by case, metric and strategy, mean over seeds and modalities."""
        keys = ["case", "metric", "strategy"]
        averaged: pd.DataFrame = self.frame.groupby(keys, sort=False)[
            ["precision", "recall"]
        ].mean()
        return averaged.reset_index()

    @property
    def summary(self) -> str:
        """The best of each case beside MINER's default."""
        parts = []
        for case, rows in self.means.groupby("case", sort=False):
            best = rows.sort_values("precision", ascending=False, kind="stable").iloc[0]
            default = rows[(rows["metric"] == PUBLISHED) & (rows["strategy"] == "LA_MU")]
            beside = (
                f" (MINER's default {default['precision'].iloc[0]:.2f})" if len(default) else ""
            )
            parts.append(
                f"{case}: {best['metric']} by {best['strategy']}, {best['precision']:.2f}{beside}"
            )
        return f"Best precision at K of {len(self.means)} ways: {'; '.join(parts)}."

    def figure(self) -> Figure:
        """Precision by metric (rows) and strategy (columns), a panel for each case."""
        cases = list(dict.fromkeys(self.frame["case"]))
        found, axes = panels(len(cases), columns=min(4, len(cases)))
        for panel, case in zip(axes, cases, strict=True):
            rows = self.means[self.means["case"] == case]
            table = rows.pivot(index="metric", columns="strategy", values="precision")
            table = table.loc[rows["metric"].unique(), rows["strategy"].unique()]
            image = panel.imshow(table.to_numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
            panel.set_xticks(range(table.shape[1]), table.columns, rotation=60, ha="right")
            panel.set_yticks(range(table.shape[0]), table.index)
            panel.set_title(str(case))
            for y, line in enumerate(table.to_numpy()):
                for x, value in enumerate(line):
                    colour = "black" if value > 0.6 else "white"
                    panel.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, size=7)
        found.colorbar(image, ax=axes, label="precision at K")
        return found


def recovery(
    plantings: Iterable[Planting] | None = None,
    strategies: Sequence[str] = tuple(STRATEGIES),
    batch_size: int = 16,
) -> Recovery:
    """Precision and recall at K of every metric and strategy where the neurons are known.

    Each planted model is mined with all metrics, and attributed, in one pass over its questions.

    Args:
        plantings: What `ml.organisms.planted` returns, in no bridge yet; by default all its cases
            with seeds 0, 1 and 2.
        strategies: Names of strategies, as `select` takes them.
        batch_size: Samples in one forward pass.

    Raises:
        ValueError: A strategy is unknown, or there is no planted model.

    Example:
        found = ml.experiments.recovery([ml.organisms.planted("rare", seed=1)])
        found.means.pivot(index=["case", "metric"], columns="strategy", values="precision")
    """
    import pandas as pd

    if plantings is None:
        plantings = (planted(case, seed) for case in CASES for seed in SEEDS)
    tables = []
    for planting in plantings:
        bridge = wrap(planting.model, planting.processor)
        try:
            truth = {name: NeuronSet.of(found, bridge) for name, found in planting.truth.items()}
            analyzers = ImportanceAnalyzer(metrics=ALL_METRICS), AttributionAnalyzer()
            options: Any = {"batch_size": batch_size, "progress": False}
            questions = [Sample.of(row) for row in planting.data]
            mined, attributed = run(bridge, questions, *analyzers, **options)
        finally:
            unwrap(bridge)
        ways: list[tuple[str, ImportanceScores, Mapping[str, float] | None]]
        ways = [(metric, mined, {metric: 1.0}) for metric in ALL_METRICS]
        ways += [(PUBLISHED, mined, None), (ATTRIBUTION, attributed, None)]
        for metric, scores, weights in ways:
            for strategy in strategies:
                table = found_of(scores, truth, strategy, weights)
                table.insert(0, "strategy", strategy)
                table.insert(0, "metric", metric)
                table.insert(0, "seed", planting.seed)
                table.insert(0, "case", planting.case)
                tables.append(table)
    if not tables:
        raise ValueError("There is no planted model to recover anything from, or no strategy.")
    return Recovery(pd.concat(tables, ignore_index=True), {"strategies": list(strategies)})


def found_of(
    scores: ImportanceScores,
    truth: Mapping[str, NeuronSet],
    strategy: str = "LA_MU",
    weights: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """How many of the neurons that are known to carry a modality a selection finds.

    A strategy is given a budget of K neurons for each modality that it selects for, K being the
    number that is known; `random` draws K.

    Returns:
        A row for each modality of the truth: `modality`, `planted`, `selected`, `precision` and
        `recall`.

    Raises:
        ValueError: A modality does not occur, or as `ImportanceScores.select`.

    Example:
        >>> import torch
        >>> values = torch.eye(2).view(1, 2, 1, 2)
        >>> scores = ImportanceScores(values, ["text", "image"], metrics=["mean"])
        >>> truth = {"image": NeuronSet([(0, 1)], layers=1, neurons=2)}
        >>> found_of(scores, truth)
          modality  planted  selected  precision  recall
        0    image        1         1        1.0     1.0
    """
    import pandas as pd

    names = list(scores.select(1.0, "LA_MU", weights))
    if missing := [name for name in truth if name not in names]:
        raise ValueError(
            f"No neurons are selected for {missing[0]!r}, only for {', '.join(names)}: the data "
            "must have every modality of the truth."
        )
    rows = []
    for name, known in truth.items():
        budget = len(known) * (1 if strategy == "random" else len(names))
        chosen = scores.select(min(1.0, (budget + 0.5) / scores.total), strategy, weights)
        own = chosen["random" if strategy == "random" else name]
        hits = len(own & known)
        rows.append(
            {
                "modality": name,
                "planted": len(known),
                "selected": len(own),
                "precision": hits / len(own) if len(own) else 0.0,
                "recall": hits / len(known),
            }
        )
    return pd.DataFrame(rows)
