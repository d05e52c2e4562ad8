"""Sentences and tables that say what results hold. They compute nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

_UNITS = {"correct": "of the accuracy", "logprob": "nats of the answer's log-probability"}
_CONTROLS = {
    "random": "as many random neurons",
    "layer-matched": "as many random ones in each layer",
}


def beside_controls(table: pd.DataFrame, family: int) -> Iterator[str]:
    """What conditions cost beside their controls, a sentence for each input, condition and measure.

    Args:
        table: Rows of what `statistics.against_controls` returns.
        family: How many comparisons it was of.
    """
    for key, rows in table.groupby(["label", "condition", "measure"], sort=False):
        label, condition, measure = map(str, key)
        cost = _with_interval(rows.iloc[0], "cost", "cost_")
        beside = "; ".join(_beside(row) for _, row in rows.iterrows())
        yield (
            f"Asked about the {label}, switching off {condition} costs {cost} {_UNITS[measure]}; "
            f"{beside}."
        )
    yield (
        f"More than chance is said of all {family} comparisons together, at a level of 5 % (Holm), "
        "and only where every control costs less."
    )


def specificity(table: pd.DataFrame) -> Iterator[str]:
    """What conditions cost in their own input and in another, a sentence for each measure.

    Args:
        table: What `statistics.specificity` returns.
    """
    for _, row in table.iterrows():
        measure = str(row["measure"])
        own = _with_interval(row, "own_cost", "own_")
        other = _with_interval(row, "other_cost", "other_")
        yield (
            f"Switching off {row['condition']} costs {row['own']} questions {own} "
            f"{_UNITS[measure]} and {row['other']} questions {other}; difference "
            f"{_with_interval(row, 'difference')}: {row['verdict']}."
        )


def endings(begun: pd.DataFrame, ended: pd.DataFrame) -> Iterator[str]:
    """How many answers begin right, and how many also end there; by input and condition.

    Args:
        begun: Trials by the metric `begins`.
        ended: The same trials, or some of them, by `exact`.
    """
    key = ["label", "condition"]
    first, last = (one.groupby(key, sort=False)["correct"].mean() for one in (begun, ended))
    both = last.to_frame("ended").join(first.rename("begun"))
    for row in both.reset_index().to_dict("records"):
        off = "nothing" if row["condition"] == "intact" else row["condition"]
        yield (
            f"Asked about the {row['label']}, with {off} off, {row['begun']:.1%} of the answers "
            f"begin right and {row['ended']:.1%} also end there."
        )


def cost_table(summary: pd.DataFrame, asked: str) -> Table:
    """What ablations cost in one input modality, ratio by ratio.

    Args:
        summary: Columns `input`, `off`, `ratio`, `neurons`, `measure`, `value`, `cost`, `low` and
            `high`, one row for each input, condition and measure; the intact model's `off` is
            `"nothing"`.
        asked: The input modality.
    """
    from rich import box
    from rich.table import Table

    here = summary[summary["input"] == asked]
    intact = here[here["off"] == "nothing"].set_index("measure")["value"]
    shown = Table(
        title=f"Asked about the {asked}: accuracy {intact['correct']:.3f}, log-probability of the "
        f"answer {intact['logprob']:.3f}; what is lost [95 % interval]",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    shown.add_column("switched off", no_wrap=True)
    for column in ("neurons", "accuracy", "nats"):
        shown.add_column(column, justify="right", no_wrap=True)
    for ratio, rows in here.groupby("ratio"):
        shown.add_section()
        shown.add_row(f"[bold]{ratio:.1%}[/]")
        for off, group in rows.groupby("off", sort=False):
            row = group.set_index("measure")
            lost = (_with_interval(row.loc[measure], "cost", digits=2) for measure in _UNITS)
            shown.add_row(str(off), str(group["neurons"].iloc[0]), *lost)
    return shown


def _with_interval(row: Any, name: str, prefix: str = "", digits: int = 3) -> str:
    numbers = (row[name], row[f"{prefix}low"], row[f"{prefix}high"])
    value, low, high = (f"{number:z.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def _beside(row: Any) -> str:
    control = _CONTROLS.get(row["against"], row["against"])
    chance = "more than chance" if row["beyond_chance"] else "not shown to be more than chance"
    return (
        f"{control} cost {row['control']:z.3f} ({row['control_low']:z.3f} to "
        f"{row['control_high']:z.3f} by seed), a difference of "
        f"{_with_interval(row, 'difference')}: {chance}"
    )
