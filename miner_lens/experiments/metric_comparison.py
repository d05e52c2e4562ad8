"""Do MINER's metrics find neurons that do something for the answer? Held against attribution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

from miner_lens.analyzers.attribution import METRIC, attribute
from miner_lens.data.sample import Sample
from miner_lens.experiments.figures import panels
from miner_lens.experiments.plan import Ablation, Item, Options, Plan
from miner_lens.experiments.result import Finding
from miner_lens.experiments.specificity import read_specificity, same_question
from miner_lens.experiments.table import Trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

EVERYWHERE = "everywhere"
PROMPT = "prompt"


@dataclass(frozen=True, eq=False, repr=False)
class MetricComparison(Finding):
    """Each metric's neurons by what switching them off does, and by what attribution says of it.

    The table has a row for each input modality (`label`), measure, `metric` (MINER's, and
    `attribution` itself), modality whose neurons are `off`, and place where they are off: `at` the
    modality's own tokens, or `everywhere`. Its columns: `neurons`; `samples`, `value`, `cost` and
    its 95 % bootstrap interval `low`, `high`; and `predicted`, what attribution on the same samples
    says the cost in `logprob` will be, in nats (in rows of `logprob`; else missing).
    """

    @property
    def agreement(self) -> pd.DataFrame:
        """How each metric's ranking of all neurons agrees with attribution's, by modality.

        Columns: `metric`, `modality`, `rank_correlation` (Spearman's, with attribution),
        `amount_correlation` (with its absolute value), `neurons` (K), `overlap` (the share of the K
        highest neurons that are among attribution's K highest) and `by_chance` (what that would be
        of random neurons).
        """
        import pandas as pd

        return pd.DataFrame(self.info["agreement"])

    @property
    def predictions(self) -> pd.DataFrame:
        """By metric and place, how predicted costs agree with measured ones over labels and sets.

        Columns: `metric`, `at` (`own` tokens or `everywhere`), `sets`, `predicted` and `measured`
        (mean costs in nats) and `rank_correlation` (Spearman's; missing where either is constant).
        """
        import pandas as pd

        rows = self.frame[(self.frame["measure"] == "logprob") & (self.frame["metric"] != "")]
        rows = rows.assign(place=rows["at"].where(rows["at"] == EVERYWHERE, "own"))
        found = []
        for (metric, place), here in rows.groupby(["metric", "place"], sort=False):
            rank = _rank_correlation(here["predicted"].to_numpy(), here["cost"].to_numpy())
            about = {"metric": metric, "at": place, "sets": len(here)}
            means = {"predicted": here["predicted"].mean(), "measured": here["cost"].mean()}
            found.append(about | means | {"rank_correlation": rank})
        return pd.DataFrame(found)

    @property
    def specificity(self) -> pd.DataFrame:
        """Each metric's specificity index at equal size, as `Specificity.index` has it."""
        import pandas as pd

        return pd.DataFrame(self.info["specificity"])

    @property
    def summary(self) -> str:
        """Agreement, prediction and specificity of each metric, in a sentence."""
        ranks, effects = self.agreement.groupby("metric", sort=False), self.predictions
        own = effects[effects["at"] == "own"].set_index("metric")
        index = self.specificity.query("measure == 'logprob'").set_index("metric")
        parts = []
        for metric, rows in ranks:
            means = rows[["rank_correlation", "overlap", "by_chance"]].mean()
            one, specific = own.loc[metric], index.loc[metric]
            with_it = (
                ""
                if metric == METRIC
                else f"rank correlation {means['rank_correlation']:z.2f}, overlap "
                f"{means['overlap']:.1%} (by chance {means['by_chance']:.1%}), "
            )
            parts.append(
                f"{metric}: {with_it}cost at own tokens {one['measured']:z.3f} nats (predicted "
                f"{one['predicted']:z.3f}), specificity {specific['index']:z.2f} "
                f"[{specific['low']:z.2f}, {specific['high']:z.2f}]"
            )
        return f"Held against attribution, by metric. {'; '.join(parts)}."

    def figure(self) -> Figure:
        """Measured costs against predicted ones, at own tokens, a panel for each label."""
        rows = self.frame[(self.frame["measure"] == "logprob") & (self.frame["metric"] != "")]
        rows = rows[rows["at"] != EVERYWHERE]
        labels = list(rows["label"].unique())
        found, axes = panels(len(labels))
        for panel, label in zip(axes, labels, strict=True):
            here = rows[rows["label"] == label]
            for metric, some in here.groupby("metric", sort=False):
                sides = [some["cost"] - some["low"], some["high"] - some["cost"]]
                panel.errorbar(some["predicted"], some["cost"], sides, fmt="o", label=metric)
            ends = (float(here["predicted"].min()), float(here["predicted"].max()))
            panel.plot(ends, ends, color="#999999", linewidth=0.8)
            panel.set(title=f"asked: {label}", xlabel="predicted cost (nats)")
        axes[0].set_ylabel("measured cost (nats)")
        axes[-1].legend(frameon=False, fontsize="small")
        return found


def comparison_plan(
    scores: ImportanceScores, attribution: ImportanceScores, ratio: float = 0.02
) -> Plan:
    """What `metric_comparison` switches off: each metric's neurons, equally many of each modality.

    Raises:
        ValueError: The scores are of other models, sites or modalities, or as `select`.
    """
    rows = []
    for metric, chosen in _selected(scores, attribution, ratio).items():
        for modality, neurons in chosen.items():
            for at in (modality, EVERYWHERE):
                about = {"metric": metric, "off": modality, "at": at}
                where = {"at": modality} if at == modality else {}
                name = f"{modality} by {metric}, {at}"
                rows.append(Ablation.of(name, neurons, about, **where))
    return Plan(tuple(rows))


def read_comparison(
    table: Trials,
    plan: Plan,
    scores: ImportanceScores,
    attribution: ImportanceScores,
    predicted: Mapping[str, ImportanceScores],
    question: Callable[[str], str] = same_question,
) -> MetricComparison:
    """The comparison that finished trials of a plan amount to.

    Args:
        table: Trials whose labels are the input modalities.
        plan: What `comparison_plan` made of `scores` and `attribution`.
        scores: What `ml.mine` returns.
        attribution: What `ml.attribute` returns, of the same samples.
        predicted: Attribution on the samples that were tried, by label.
        question: As for `specificity`.

    Raises:
        ValueError: A label has no prediction, or as `specificity`.
        ImportError: scipy is missing.
    """
    frame = plan.costs(table).drop(columns=["condition", "seeds"])
    if lacking := sorted(set(frame["label"]) - set(predicted)):
        raise ValueError(
            f"There is no attribution of label {lacking[0]!r}; there are {', '.join(predicted)}."
        )
    sets = {(row.about["metric"], row.about["off"]): row.conditions[0].neurons for row in plan.rows}
    effects = []
    for row in frame.to_dict("records"):
        neurons = sets.get((row["metric"], row["off"]))
        if not isinstance(neurons, NeuronSet) or row["measure"] != "logprob":
            effects.append(float("nan"))
            continue
        tokens = PROMPT if row["at"] == EVERYWHERE else row["off"]
        effect = predicted[row["label"]][tokens][0]
        effects.append(float(effect[neurons.mask].double().sum()))
    metrics = list(dict.fromkeys(row.about["metric"] for row in plan.rows))
    indices = []
    for metric in metrics:
        index = read_specificity(table, _everywhere(plan, metric), question).index
        indices += [{"metric": metric, **record} for record in index.to_dict("records")]
    info = {"agreement": _agreement(scores, attribution, sets), "specificity": indices}
    return MetricComparison(frame.assign(predicted=effects), plan.about(table) | info)


def metric_comparison(
    model: Any,
    data: Mapping[str, Iterable[Item]],
    scores: ImportanceScores,
    attribution: ImportanceScores,
    ratio: float = 0.02,
    question: Callable[[str], str] = same_question,
    **options: Unpack[Options],
) -> MetricComparison:
    """Hold MINER's metrics against attribution: rankings, predicted effects, specificity.

    Each metric by itself selects equally many neurons of each modality (`LA_MU`), as attribution
    does. They are switched off at their modality's tokens, where attribution says what that costs
    to first order, and everywhere, where specificity is asked for. What is predicted is computed on
    the samples that are tried, of the prompt's tokens; everywhere is also the answer's tokens.

    Args:
        model: A `TransformerBridge` with a processor.
        data: By input modality, the same questions asked through it; other ones than were mined.
        scores: What `ml.mine` returns, of data that have all these modalities.
        attribution: What `ml.attribute` returns, of the same data as `scores`.
        ratio: As for `select`.
        question: As for `specificity`.
        options: `batch_size`, `metric`, `checkpoint` and the others of `ml.trials`.

    Raises:
        ValueError: As `comparison_plan` and `specificity`.

    Example:
        found = ml.experiments.metric_comparison(model, asked, scores, ml.attribute(model, data))
        found.agreement, found.predictions, found.specificity
    """
    plan = comparison_plan(scores, attribution, ratio)
    asked = {label: [Sample.of(one) for one in some] for label, some in data.items()}
    table = plan.run(model, asked, options)
    batch_size, progress = options.get("batch_size", 16), options.get("progress", True)
    predicted = {
        label: attribute(model, some, batch_size=batch_size, progress=progress, site=scores.site)
        for label, some in asked.items()
    }
    return read_comparison(table, plan, scores, attribution, predicted, question)


def _selected(
    scores: ImportanceScores, attribution: ImportanceScores, ratio: float
) -> dict[str, Mapping[str, NeuronSet]]:
    """What each metric by itself selects."""
    if METRIC not in attribution.metrics:
        raise ValueError(
            f"attribution has {', '.join(attribution.metrics)} and no {METRIC!r}: give what "
            "ml.attribute returns."
        )
    sizes = [(one.site, one.layers, one.neurons, one.modalities) for one in (scores, attribution)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"scores are of {_said(scores)}, attribution of {_said(attribution)}. Compute both on "
            "the same model, site and data."
        )
    found: dict[str, Mapping[str, NeuronSet]] = {
        metric: scores.select(ratio, "LA_MU", {metric: 1.0}) for metric in scores.metrics
    }
    return found | {METRIC: attribution.select(ratio, "LA_MU", {METRIC: 1.0})}


def _said(scores: ImportanceScores) -> str:
    shape = f"{scores.layers} x {scores.neurons} neurons of site {scores.site!r}"
    return f"{shape} with {', '.join(scores.modalities)}"


def _everywhere(plan: Plan, metric: str) -> Plan:
    """The rows in which a metric's neurons are off everywhere, under the names they were tried."""
    rows = []
    for row in plan.rows:
        if (row.about["metric"], row.about["at"]) == (metric, EVERYWHERE):
            (tried,) = plan.groups[row.name]
            rows.append(replace(row, conditions=(replace(row.conditions[0], name=tried),)))
    return Plan(tuple(rows))


def _agreement(
    scores: ImportanceScores,
    attribution: ImportanceScores,
    sets: Mapping[tuple[str, str], Any],
) -> list[dict[str, Any]]:
    """Rank correlations and overlaps of each metric with attribution, by modality."""
    rows = []
    for (metric, modality), chosen in sets.items():
        effect = attribution[modality][attribution.metrics.index(METRIC)].flatten().numpy()
        known = attribution if metric == METRIC else scores
        ranked = known[modality][known.metrics.index(metric)].flatten().numpy()
        best = sets[METRIC, modality]
        rows.append(
            {
                "metric": metric,
                "modality": modality,
                "rank_correlation": _rank_correlation(ranked, effect),
                "amount_correlation": _rank_correlation(ranked, abs(effect)),
                "neurons": len(chosen),
                "overlap": len(chosen & best) / max(1, len(chosen)),
                "by_chance": len(best) / ranked.size,
            }
        )
    return rows


def _rank_correlation(one: Any, other: Any) -> float:
    """Spearman's rank correlation; NaN where either is constant, of which it says nothing."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("Rank correlations need scipy: pip install miner-lens[demo]") from error
    if (one == one[0]).all() or (other == other[0]).all():
        return float("nan")
    return float(stats.spearmanr(one, other).statistic)
