"""Which metrics and which strategy find the neurons that cost most?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from miner_lens.experiments.figures import panels
from miner_lens.experiments.plan import Ablation, Data, Options, Plan, said
from miner_lens.experiments.result import Finding
from miner_lens.experiments.table import Trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.kernels import METRICS
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.select import PUBLISHED, default_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The ten of MINER's published code (`main.py`), in its order.
_PUBLISHED_MIXES = (
    (1, 0, 0, 0, 0),
    (0, 1, 0, 0, 0),
    (0, 0, 1, 0, 0),
    (0, 0, 0, 1, 0),
    (0, 0, 0, 0, 1),
    (0, 0.5, 0.5, 0, 0),
    (0, 0, 0, 0.5, 0.5),
    (0, 0.25, 0.25, 0.5, 0),
    (0, 0.25, 0.25, 0, 0.5),
    (0.2, 0.2, 0.2, 0.2, 0.2),
)


def mixes(metrics: Sequence[str] = METRICS) -> dict[str, dict[str, float]]:
    """MINER's ten published mixes of metrics, those of them that need no other metric than these.

    Where none fits, the default weights.

    Example:
        >>> list(mixes(("prob", "mean", "max")))
        ['prob', 'mean', 'max', '0.5 mean + 0.5 max']
    """
    found = {}
    for mix in _PUBLISHED_MIXES:
        weights = {name: float(one) for name, one in zip(METRICS, mix, strict=True) if one}
        if weights.keys() <= set(metrics):
            found[_named(weights)] = weights
    if not found:
        weights = default_weights(metrics)
        found[_named(weights)] = weights
    return found


def _named(weights: Mapping[str, float]) -> str:
    if len(weights) == 1:
        return next(iter(weights))
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items())


@dataclass(frozen=True, eq=False, repr=False)
class SelectionGrid(Finding):
    """What all selected neurons cost, by strategy and metric weights.

    The table has a row for each label, measure, strategy and mix: `strategy`, `weights` (what the
    mix is called), `neurons`, `samples`, `value`, `cost` and its 95 % bootstrap interval `low`,
    `high`; the intact model's `strategy` is empty. `info["distinct"]` is how many different sets
    there are among the combinations.
    """

    @property
    def summary(self) -> str:
        """The combination that costs most, and how many are different at all."""
        parts = []
        rows = self.frame[(self.frame["measure"] == "logprob") & (self.frame["strategy"] != "")]
        for label, here in rows.groupby("label", sort=False):
            order = here.sort_values("cost", ascending=False, kind="stable")
            most, least = order.iloc[0], order.iloc[-1]
            parts.append(
                f"on {label}, {most['strategy']} by {most['weights']} costs most, {said(most)} "
                f"nats, and {least['strategy']} by {least['weights']} least, {said(least)}"
            )
        combinations = len(rows.drop_duplicates(["strategy", "weights"]))
        return (
            f"Of {combinations} combinations of strategy and weights, which select "
            f"{self.info['distinct']} different sets: {'; '.join(parts)}. The largest of many "
            "costs is larger by chance alone."
        )

    def figure(self) -> Figure:
        """Costs in nats by weights (rows) and strategy (columns), a panel for each label."""
        rows = self.frame[(self.frame["measure"] == "logprob") & (self.frame["strategy"] != "")]
        labels = list(rows["label"].unique())
        found, axes = panels(len(labels))
        low, high = float(rows["cost"].min()), float(rows["cost"].max())
        for panel, label in zip(axes, labels, strict=True):
            here = rows[rows["label"] == label]
            table = here.pivot(index="weights", columns="strategy", values="cost")
            table = table.loc[here["weights"].unique(), here["strategy"].unique()]
            image = panel.imshow(table.to_numpy(), vmin=low, vmax=high, aspect="auto")
            panel.set_xticks(range(table.shape[1]), table.columns, rotation=60, ha="right")
            panel.set_yticks(range(table.shape[0]), table.index)
            panel.set_title(f"asked: {label}")
        found.colorbar(image, ax=axes, label="log-probability lost (nats)")
        return found


def grid_plan(
    scores: ImportanceScores,
    ratio: float = 0.02,
    strategies: Sequence[str] = PUBLISHED,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    seed: int = 0,
) -> Plan:
    """What `selection_grid` switches off; equal sets are tried once.

    Raises:
        ValueError: As `select`.
    """
    rows = []
    for strategy in strategies:
        for name, mix in (mixes(scores.metrics) if weights is None else weights).items():
            chosen = NeuronSet.union(scores.select(ratio, strategy, mix, seed=seed))
            about = {"strategy": strategy, "weights": name}
            rows.append(Ablation.of(f"{strategy} by {name}", chosen, about))
    if not rows:
        raise ValueError("Name at least one strategy and one mix of weights.")
    return Plan(tuple(rows), (seed,))


def read_grid(table: Trials, plan: Plan) -> SelectionGrid:
    """The grid that finished trials of a plan amount to.

    Raises:
        ValueError: The table lacks a condition of the plan, or as `statistics.costs`.
    """
    frame = plan.costs(table).drop(columns=["condition", "seeds"])
    distinct = len({row.conditions[0].neurons for row in plan.rows})
    return SelectionGrid(frame, plan.about(table) | {"distinct": distinct})


def selection_grid(
    model: Any,
    data: Data,
    scores: ImportanceScores,
    ratio: float = 0.02,
    strategies: Sequence[str] = PUBLISHED,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    seed: int = 0,
    **options: Unpack[Options],
) -> SelectionGrid:
    """Switch off what each strategy selects by each mix of metrics.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, other ones than were mined; their labels are kept apart.
        scores: What `ml.mine` returns.
        ratio: As for `select`.
        strategies: Names of strategies; MINER's five.
        weights: Mixes by name, as `select` takes them; MINER's ten, as far as the metrics that
            they need were scored.
        seed: Of the strategy `random`.
        options: `batch_size`, `metric`, `checkpoint` and the others of `ml.trials`.

    Raises:
        ValueError: As `select` and `ml.trials`.

    Example:
        grid = ml.experiments.selection_grid(model, data, scores, strategies=["LA_MU", "lape"])
        print(grid.summary)
    """
    plan = grid_plan(scores, ratio, strategies, weights, seed)
    return read_grid(plan.run(model, data, options), plan)
