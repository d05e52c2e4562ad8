"""One row of the table, and the file that keeps rows."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from benchmarks.measure import Spread

COLUMNS: dict[str, Literal["left", "right"]] = {
    "row": "left",
    "median (quartiles)": "right",
    "runs": "right",
    "target": "right",
    "peak MB": "right",
    "extra MB": "right",
    "target MB": "right",
    "measures": "left",
    "setting": "left",
}


@dataclass(frozen=True)
class Target:
    """A bound that a figure is held against."""

    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether a figure keeps it."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Result:
    """What was measured for one row.

    Attributes:
        name: What selects it.
        measures: What the value is, in words.
        setting: Sizes, dtype and batch.
        value: The figure, median over runs; None where only memory was measured.
        seconds: Median seconds of each workload that was timed.
        peak_mb: Memory of each workload beyond what is in use before it, in the order that
            `measures` names them in.
        extra_mb: The difference between the workloads' peaks.
    """

    name: str
    measures: str
    setting: dict[str, Any] = field(default_factory=dict)
    value: Spread | None = None
    target: Target | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    extra_mb: float | None = None
    extra_target: Target | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it is written to the file, with whether the targets are met."""
        met = None
        if self.target is not None and self.value is not None:
            met = self.target.met(self.value.median)
        extra_met = None
        if self.extra_target is not None and self.extra_mb is not None:
            extra_met = self.extra_target.met(self.extra_mb)
        return asdict(self) | {"met": met, "extra_met": extra_met}


class File:
    """Rows by name, as JSON, complete on disk after every row.

    Raises:
        ValueError: The file holds rows that were measured in another environment, beside which new
            ones would mean nothing.
    """

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"environment": environment, "rows": {}}
        if not path.exists():
            return
        found = json.loads(path.read_text())
        former = found.get("environment")
        if former != environment:
            changed = [key for key in environment if (former or {}).get(key) != environment[key]]
            raise ValueError(
                f"{path} holds rows of another environment (other {', '.join(changed)}); name "
                f"another file with --out, or remove it."
            )
        self.content["rows"] = found["rows"]

    def add(self, result: Result) -> None:
        """Write a row, in place of an older one of the same name."""
        self.content["rows"][result.name] = result.to_dict()
        draft = self.path.with_name(self.path.name + ".new")
        draft.write_text(json.dumps(self.content, indent=2) + "\n")
        os.replace(draft, self.path)

    def table(self, names: list[str]) -> Table:
        """The rows of these names that have been measured, in that order."""
        table = Table(title="miner-lens benchmarks")
        for name, side in COLUMNS.items():
            table.add_column(name, justify=side, no_wrap=side == "right" or name == "row")
        for name in names:
            if name in self.content["rows"]:
                table.add_row(*_cells(self.content["rows"][name]))
        return table

    def markdown(self, names: list[str]) -> str:
        """The same table for documentation."""
        table = self.table(names)
        lines = [[str(column.header) for column in table.columns]]
        lines.append(["---:" if column.justify == "right" else "---" for column in table.columns])
        lines += [_cells(self.content["rows"][n]) for n in names if n in self.content["rows"]]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: dict[str, Any]) -> list[str]:
    value, extra = row["value"], row["extra_mb"]
    return [
        row["name"],
        "" if value is None else f"{value['median']:.3g} ({value['low']:.3g}-{value['high']:.3g})",
        "" if value is None else str(value["runs"]),
        _target(row["target"], row["met"]),
        " / ".join(f"{peak:.0f}" for peak in row["peak_mb"].values()),
        "" if extra is None else f"{extra:z.0f}",
        _target(row["extra_target"], row["extra_met"]),
        row["measures"],
        ", ".join(v if k == "model" else f"{k} {v}" for k, v in row["setting"].items()),
    ]


def _target(target: dict[str, Any] | None, met: bool | None) -> str:
    if target is None:
        return ""
    verdict = {None: "", True: " met", False: " MISSED"}[met]
    return f"{Target(**target)}{verdict}"
