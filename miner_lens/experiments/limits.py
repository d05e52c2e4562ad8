"""What the data behind a result cannot say, in computed sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from miner_lens.experiments.card import NeuronCard
from miner_lens.experiments.result import Finding
from miner_lens.experiments.table import Trials
from miner_lens.scoring.scores import ImportanceScores

# Of a normal distribution: a difference is found at a level of 5 %, two-sided, in 80 % of studies,
# if it is so many standard errors large.
DETECTABLE = 1.960 + 0.842
# Percentile bootstrap intervals of fewer samples are noticeably too narrow.
FEW = 10
UNITS = {"correct": "of the accuracy", "logprob": "nats of the answer's log-probability"}


def limits(result: Any, intact: str = "intact") -> list[str]:
    """What a result leaves open: too few samples, intervals over 0, what never occurred.

    Args:
        result: A result, finding, table of trials or any other object, of which nothing is said.
        intact: The condition of a table of trials that others are held against.

    Example:
        >>> import numpy as np
        >>> right = np.array([[True, True], [True, True]])
        >>> table = Trials(("a", "b"), (None, None), ("intact", "off"), right, -1.0 * right)
        >>> limits(table)[1]
        'No answer changed under any condition: of 2 samples, up to 78 % might (95 % confidence).'
    """
    if isinstance(result, NeuronCard):
        return list(_of_card(result))
    if isinstance(result, ImportanceScores):
        return list(_of_scores(result))
    if isinstance(result, Trials):
        return list(_of_trials(result.to_frame(), intact))
    if isinstance(result, Finding):
        return list(_of_intervals(result.frame))
    table = getattr(result, "trials", None)
    return list(_of_trials(table.to_frame(), intact)) if isinstance(table, Trials) else []


def _of_trials(table: pd.DataFrame, intact: str) -> Iterator[str]:
    if intact not in set(table["condition"]) or table["condition"].nunique() < 2:
        return
    for label, rows in table.groupby("label", sort=False, dropna=False):
        under = "" if pd.isna(label) else f" under label {label!s}"
        for measure in ("correct", "logprob"):
            values = rows.astype({measure: float})
            wide = values.pivot(index="sample", columns="condition", values=measure)
            lost = wide.rsub(wide[intact], axis=0).drop(columns=intact)
            count = len(lost)
            if count < 2:
                yield f"One sample{under} says nothing of any other."
                break
            if count < FEW and measure == "correct":
                yield _few(count, under)
            if measure == "correct" and not lost.to_numpy().any():
                yield _unchanged(count, under)
                continue
            if not lost.to_numpy().any():
                continue
            least = DETECTABLE * float(lost.std().max()) / count**0.5
            yield (
                f"With {count} samples{under}, differences from the intact model below about "
                f"{least:.2g} {UNITS[measure]} are likely to be missed (80 % power at a level of "
                "5 %, by the condition that varies most)."
            )


def _of_card(card: NeuronCard) -> Iterator[str]:
    if not card.costs:
        yield (
            "Without at least two samples with answers nothing is known of what switching the "
            "neuron off does."
        )
    for row in card.costs:
        if row["low"] <= 0 <= row["high"]:
            under = f" under label {row['label']}" if row["label"] else ""
            what = {"correct": "the accuracy", "logprob": "the answer's log-probability"}
            yield (
                f"Switching it off alone is not shown to change {what[row['measure']]}{under}: "
                f"[{row['low']:z.3g}, {row['high']:z.3g}] on {row['samples']} samples."
            )
    for label, count in {str(row["label"]): row["samples"] for row in card.costs}.items():
        if count < FEW:
            yield _few(count, f" under label {label}" if label else "")
    yield (
        f"The samples shown are the strongest of {card.info['samples']}; what fires the neuron "
        "outside of these data is not known."
    )


def _few(count: int, under: str) -> str:
    return f"{count} samples{under} are few: intervals over them are narrower than they should be."


def _unchanged(count: int, under: str) -> str:
    # The exact bound: so large a share would show no change in 5 % of studies.
    most = 100 * (1 - 0.05 ** (1 / count))
    return (
        f"No answer changed under any condition{under}: of {count} samples, up to {most:.0f} % "
        "might (95 % confidence)."
    )


def _of_scores(scores: ImportanceScores) -> Iterator[str]:
    pairs = zip(scores.modalities, scores.occurrences, strict=True)
    absent = [name for name, count in pairs if count == 0]
    if absent:
        yield f"No sample has {', '.join(absent)}, so nothing is known of these."
    if scores.skipped:
        yield f"{scores.skipped} samples could not be used and are not in the scores."
    yield (
        f"Scores are means over {scores.samples} samples, without intervals; how stable a "
        "selection by them is says a split of the data (ml.experiments.stability)."
    )


def _of_intervals(frame: pd.DataFrame) -> Iterator[str]:
    if not {"low", "high"} <= set(frame.columns):
        return
    open_ = int(((frame["low"] <= 0) & (frame["high"] >= 0)).sum())
    if open_:
        yield f"The 95 % intervals of {open_} of {len(frame)} rows include 0."
    if {"measure", "samples", "label", "cost"} <= set(frame.columns):
        for (label, measure), rows in frame.groupby(["label", "measure"], sort=False):
            yield from _of_costs(str(label), str(measure), rows)


def _of_costs(label: str, measure: str, rows: pd.DataFrame) -> Iterator[str]:
    """What so many samples would miss, by the width of the intervals over them."""
    count, widths = int(rows["samples"].max()), rows["high"] - rows["low"]
    if count < FEW and measure == "correct":
        yield _few(count, f" of {label}")
    if widths.max() > 0 and measure in UNITS:
        # An interval reaches 1.96 standard errors to either side.
        middle, most = (DETECTABLE * wide / (2 * 1.960) for wide in (widths.median(), widths.max()))
        yield (
            f"With {count} samples of {label}, costs below about {middle:.2g} {UNITS[measure]} are "
            f"likely to be missed in the median row, below {most:.2g} in the one that varies most "
            "(80 % power at a level of 5 %)."
        )
    elif measure == "correct":
        yield _unchanged(count, f" of {label}")
