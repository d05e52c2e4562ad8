"""Measure miner-lens: ratios of times taken in turn, and peak memory; print and write a table.

`make bench` measures every row. `--rows 'mine-*'` measures some, and adds them to those that the
file has already. docs/performance.md says what the rows are.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

from benchmarks import comparisons, tables
from benchmarks.catalogue import Group, catalogue
from benchmarks.measure import environment
from benchmarks.results import File


def main() -> None:
    """Measure the selected rows, write each to the file as it is done, and print them."""
    options = _options()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if options.peaks is not None:
        asked = json.loads(options.peaks)
        measured = tables.measure_peak if "table" in asked else comparisons.measure_peaks
        print(measured(asked, options.device))
        return
    groups = catalogue(options.device)
    chosen = choose(groups, options.rows)
    names = [name for group in groups for name in group.names() if name in chosen]
    if options.list:
        slow = {name for group in groups if group.slow for name in group.names()}
        for name in names if options.rows else [n for group in groups for n in group.names()]:
            print(f"{name}  (only if asked for: slow here)" if name in slow else name)
        return
    console = Console()
    console.width = max(console.width, 160)  # also where the output is no terminal
    try:
        file = File(options.out, environment(options.device))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if options.table or options.markdown:
        shown = [name for group in groups for name in group.names()]
        console.print(file.table(shown)) if options.table else print(file.markdown(shown))
        return
    _measure(groups, chosen, options, file, console)
    console.print(file.table(names))


def _measure(
    groups: list[Group],
    chosen: set[str],
    options: argparse.Namespace,
    file: File,
    console: Console,
) -> None:
    work = [(group, [n for n in group.names() if n in chosen]) for group in groups]
    work = [(group, names) for group, names in work if names]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        for group, names in work:
            total = group.steps(names, options.runs)
            task = bar.add_task(f"{names[0]}{' ...' if names[1:] else ''}", total=total)
            tick = partial(bar.advance, task)
            for result in group.measure(names, options.runs, options.device, tick):
                file.add(result)
                value = "" if result.value is None else f" {result.value.median:.3f}"
                extra = "" if result.extra_mb is None else f" {result.extra_mb:+.0f} MB"
                bar.console.print(f"{result.name}:{value}{extra}")
            if options.device.startswith("cuda"):
                torch.cuda.empty_cache()


def choose(groups: list[Group], patterns: list[str] | None) -> set[str]:
    """The names that match; without patterns all but the slow ones."""
    if patterns is None:
        return {name for group in groups if not group.slow for name in group.names()}
    names = [name for group in groups for name in group.names()]
    found = {name for name in names for pattern in patterns if fnmatch(name, pattern)}
    if not found:
        raise SystemExit(f"No row matches {' '.join(patterns)}; --list shows their names.")
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", nargs="+", help="names, * for any characters; default all")
    parser.add_argument("--runs", type=int, default=5, help="timed runs (default 5)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.json"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    parser.add_argument("--table", action="store_true", help="print what the file has and stop")
    parser.add_argument("--markdown", action="store_true", help="the same for documentation")
    parser.add_argument("--peaks", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
