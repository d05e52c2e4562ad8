"""What a table of trials says: costs, costs beside those of controls, specificity.

Every function takes the table that `Trials.to_frame` makes (or several, one below the other) and
returns a table. Labels are kept apart: they are the groups of samples that are compared, such as
questions about an image and the same questions about a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from miner_lens.experiments.resampling import holm, interval, p_values

if TYPE_CHECKING:
    import pandas as pd

# What is measured in each trial.
MEASURES = ("correct", "logprob")


@dataclass(frozen=True)
class Comparison:
    """A condition and the controls that it is held against.

    Attributes:
        condition: The condition's name.
        against: What tables call the controls.
        controls: The names of the control conditions, such as one for each seed.
    """

    condition: str
    against: str
    controls: Sequence[str]


def averaged(trials: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """A table of trials in which several conditions are one: each sample's mean over them.

    Args:
        trials: A table of trials.
        groups: The new conditions, each by its name, with the conditions that it is the mean of.
            A condition that is in no group is left out.

    Raises:
        ValueError: There is no such condition.
    """
    import pandas as pd

    _require(trials, [name for group in groups.values() for name in group])
    parts = []
    for name, group in groups.items():
        chosen = trials[trials["condition"].isin(group)]
        keys = chosen.groupby(["label", "sample"], sort=False, dropna=False)
        parts.append(keys[list(MEASURES)].mean().reset_index().assign(condition=name))
    return pd.concat(parts, ignore_index=True)[["sample", "label", "condition", *MEASURES]]


def costs(
    trials: pd.DataFrame, intact: str = "intact", resamples: int = 5000, seed: int = 0
) -> pd.DataFrame:
    """What each condition costs: the mean over samples of intact minus condition.

    Args:
        trials: A table of trials.
        intact: The condition that the others are held against.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        One row for each label, condition (also the intact one) and measure: `label`, `condition`,
        `measure` (`correct`, or `logprob` in nats), `samples`, `value` (the measure's mean),
        `cost`, and `low` and `high`, a 95 % percentile bootstrap interval of the cost over samples.

    Raises:
        ValueError: A condition lacks a sample that the intact model has, or there is no intact one.
        ImportError: scipy is missing.
    """
    import pandas as pd

    tables = []
    for label, measure, wide in _paired(trials, intact):
        lost = wide.rsub(wide[intact], axis=0)
        low, high = interval(lost.T.to_numpy(), resamples, seed)
        tables.append(
            pd.DataFrame(
                {
                    "label": label,
                    "condition": wide.columns,
                    "measure": measure,
                    "samples": len(wide),
                    "value": wide.mean().to_numpy(),
                    "cost": lost.mean().to_numpy(),
                    "low": low,
                    "high": high,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def against_controls(
    trials: pd.DataFrame,
    comparisons: Iterable[Comparison],
    intact: str = "intact",
    alpha: float = 0.05,
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether conditions cost more than their controls, all in one family.

    Of each sample the controls' costs are averaged. The p-value is of a one-sided sign-flip
    permutation test over samples: that a condition costs no more than its controls. All rows of the
    result, over labels, comparisons and measures, are one family, whose chance of any false finding
    Holm's method holds at `alpha`. The test knows which samples were drawn, not which neurons: so
    `beyond_chance` also asks that the condition cost more than each control by itself.

    Args:
        trials: A table of trials.
        comparisons: Each is made in every label that has its conditions.
        intact: The condition that the others are held against.
        alpha: Level of the family.
        resamples: Of the bootstrap, and of the test unless all sign flips are fewer.
        seed: Of both.

    Returns:
        One row for each label, comparison and measure: `label`, `condition`, `against`, `measure`,
        `samples`, `cost` with `cost_low`, `cost_high`, `control` (the controls' mean cost) with
        `control_low`, `control_high` (the least and the greatest cost of a control), `difference`
        with `low`, `high`, `p`, `p_holm` and `beyond_chance`. Intervals of `cost` and `difference`
        are 95 % percentile bootstrap intervals over samples.

    Raises:
        ValueError: There is no comparison, one has no control, or no label has its conditions.
        ImportError: scipy or statsmodels is missing.
    """
    import pandas as pd

    comparisons = list(comparisons)
    _check_comparisons(trials, comparisons)
    tables = []
    for label, measure, wide in _paired(trials, intact):
        here = [one for one in comparisons if {one.condition, *one.controls} <= set(wide.columns)]
        if here:
            lost = wide.rsub(wide[intact], axis=0)
            tables.append(_compared(lost, here, resamples, seed))
            tables[-1].insert(0, "label", label)
            tables[-1].insert(3, "measure", measure)
    if not tables:
        raise ValueError("No label has a condition and its controls, so nothing can be compared.")
    table = pd.concat(tables, ignore_index=True)
    table["p_holm"] = holm(table["p"].to_numpy())
    table["beyond_chance"] = (table["p_holm"] <= alpha) & (table["cost"] > table["control_high"])
    return table


def specificity(
    trials: pd.DataFrame,
    own: Mapping[str, str],
    question: Callable[[str], str],
    intact: str = "intact",
    resamples: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether a condition costs more where its neurons should serve than elsewhere.

    The same questions are asked in two ways, such as about an image and about a sentence that says
    the same; labels tell the ways apart. Costs are compared question by question, as they are: a
    way in which there is more to lose may lose more.

    Args:
        trials: A table of trials.
        own: Conditions, each with the label where it should cost most.
        question: Makes a name of the question of a sample's id, the same under both labels.
        intact: The condition that the others are held against.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        One row for each condition, other label and measure: `condition`, `own`, `other` (the two
        labels), `measure`, `questions`, `own_cost`, `other_cost` and their `difference`, each with
        a 95 % percentile bootstrap interval over questions (`own_low`, `own_high`, ..., `low`,
        `high`), and `verdict`: `"specific"` where the difference's interval lies above 0,
        `"hurts the other more"` where it lies below, else `"not shown to be specific"`. Intervals
        and verdicts are each by itself: of many, 1 in 20 errs.

    Raises:
        ValueError: A condition or label does not occur, or two labels share no question, or one
            label asks a question twice.
        ImportError: scipy is missing.
    """
    import pandas as pd

    _require(trials, own)
    lost: dict[tuple[Any, str], Any] = {}
    for label, measure, wide in _paired(trials, intact):
        names = wide.index.map(question)
        if names.has_duplicates:
            twice = names[names.duplicated()][0]
            raise ValueError(f"Question {twice!r} is asked twice in {label!r}; it must be unique.")
        lost[label, measure] = wide.rsub(wide[intact], axis=0).set_axis(names)
    labels = list(dict.fromkeys(label for label, _ in lost))
    rows = []
    for condition, here in own.items():
        if here not in labels:
            raise ValueError(f"There is no label {here!r}; there are {_list(labels)}.")
        for there in (label for label in labels if label != here):
            for measure in MEASURES:
                one, other = lost[here, measure], lost[there, measure]
                if condition in one and condition in other:
                    found = _two_ways(one[condition], other[condition], resamples, seed)
                    names = {"condition": condition, "own": here, "other": there}
                    rows.append({**names, "measure": measure, **found})
    if not rows:
        raise ValueError("No condition was tried under two labels, so nothing can be compared.")
    return pd.DataFrame(rows)


def _compared(
    lost: pd.DataFrame, comparisons: Sequence[Comparison], resamples: int, seed: int
) -> pd.DataFrame:
    """Comparisons of costs `[sample condition]`, one row each."""
    import pandas as pd

    controls = [lost[list(one.controls)] for one in comparisons]
    pairs = zip(comparisons, controls, strict=True)
    differences = np.stack([(lost[one.condition] - many.mean(axis=1)) for one, many in pairs])
    low, high = interval(differences, resamples, seed)
    cost = lost[[one.condition for one in comparisons]].T.to_numpy()
    cost_low, cost_high = interval(cost, resamples, seed)
    return pd.DataFrame(
        {
            "condition": [one.condition for one in comparisons],
            "against": [one.against for one in comparisons],
            "samples": len(lost),
            "cost": cost.mean(axis=1),
            "cost_low": cost_low,
            "cost_high": cost_high,
            "control": [many.mean().mean() for many in controls],
            "control_low": [many.mean().min() for many in controls],
            "control_high": [many.mean().max() for many in controls],
            "difference": differences.mean(axis=1),
            "low": low,
            "high": high,
            "p": p_values(differences, resamples, seed),
        }
    )


def _two_ways(here: Any, there: Any, resamples: int, seed: int) -> dict[str, Any]:
    """Costs by question in two ways of asking, over the questions that both have."""
    shared = here.index.intersection(there.index)
    if shared.empty:
        raise ValueError(
            f"Two labels share no question: one has {here.index[0]!r}, the other "
            f"{there.index[0]!r}. `question` must make the same name of both."
        )
    here, there = here[shared].to_numpy(), there[shared].to_numpy()
    low, high = interval(np.stack([here, there, here - there]), resamples, seed)
    verdict = "not shown to be specific"
    if low[2] > 0:
        verdict = "specific"
    elif high[2] < 0:
        verdict = "hurts the other more"
    return {
        "questions": len(shared),
        "own_cost": here.mean(),
        "own_low": low[0],
        "own_high": high[0],
        "other_cost": there.mean(),
        "other_low": low[1],
        "other_high": high[1],
        "difference": (here - there).mean(),
        "low": low[2],
        "high": high[2],
        "verdict": verdict,
    }


def _paired(trials: pd.DataFrame, intact: str) -> Iterator[tuple[Any, str, Any]]:
    """Label, measure and values `[sample condition]`, of the conditions tried under the label."""
    _require(trials, [intact])
    for label, rows in trials.groupby("label", sort=False, dropna=False):
        if intact not in set(rows["condition"]):
            raise ValueError(f"Under label {label!r} there is no condition {intact!r}.")
        if rows["sample"].nunique() < 2:
            raise ValueError(f"Label {label!r} has one sample; an interval needs at least two.")
        order = rows["condition"].unique()
        for measure in MEASURES:
            values = rows.astype({measure: float})
            wide = values.pivot(index="sample", columns="condition", values=measure)[order]
            if wide.isna().any(axis=None):
                lacking = wide.columns[wide.isna().any()][0]
                raise ValueError(
                    f"Condition {lacking!r} was not tried on every sample of label {label!r}, and "
                    "costs are paired by sample. Try all conditions of a label on the same data."
                )
            yield label, measure, wide


def _require(trials: pd.DataFrame, names: Iterable[str]) -> None:
    known = trials["condition"].unique()
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"There is no condition {unknown[0]!r}; there are {_list(known)}.")


def _check_comparisons(trials: pd.DataFrame, comparisons: Sequence[Comparison]) -> None:
    if not comparisons:
        raise ValueError("There is nothing to compare: give at least one Comparison.")
    for one in comparisons:
        if not one.controls:
            raise ValueError(f"The comparison of {one.condition!r} has no control conditions.")
        _require(trials, [one.condition, *one.controls])


def _list(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))
