"""Where the time of mining goes: `python -m benchmarks.breakdown --pos 1246 --dtype fp32`.

Mining passes under torch.profiler. The profiler knows operations; the functions of
`miner_lens.scoring.kernels` are labelled here, whatever they are called, and each operation
counts for the innermost one around it.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import measure
from benchmarks.comparisons import Setting, workloads
from benchmarks.measure import Workload
from benchmarks.models import VL_2B
from miner_lens.running import passes
from miner_lens.running.hooks import pass_hooks
from miner_lens.scoring import kernels

LABEL = "miner_lens: "
PYTHON = "(python and calls)"


def breakdown(workload: Workload) -> dict[tuple[str, str], float]:
    """Milliseconds by part and operation; operations in no part are the model's own."""
    with _labelled(), profile(activities=[ProfilerActivity.CPU]) as found:
        workload()
    times: dict[tuple[str, str], float] = defaultdict(float)
    for event in found.events() or ():
        part, operation = _place(event)
        times[part, operation] += event.self_cpu_time_total / 1e3
    return dict(times)


def _place(event: Any) -> tuple[str, str]:
    operation = PYTHON if event.name.startswith(LABEL) else event.name.removeprefix("aten::")
    while event is not None and not event.name.startswith(LABEL):
        event = event.cpu_parent
    return ("model" if event is None else event.name.removeprefix(LABEL)), operation


@contextmanager
def _labelled() -> Iterator[None]:
    """Label the functions and methods of the kernels, and all hooks together."""
    replaced: list[tuple[Any, str, Any]] = [(passes, "pass_hooks", _hooks)]
    classes = [one for one in vars(kernels).values() if inspect.isclass(one)]
    for owner in (kernels, *(one for one in classes if one.__module__ == kernels.__name__)):
        for name, function in list(vars(owner).items()):
            if inspect.isfunction(function) and function.__module__ == kernels.__name__:
                replaced.append((owner, name, _label(name, function)))
    former = [(owner, name, vars(owner)[name]) for owner, name, _ in replaced]
    try:
        for owner, name, function in replaced:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in former:
            setattr(owner, name, function)


def _hooks(*args: Any) -> list[Any]:
    return [(point, _label("hooks", function)) for point, function in pass_hooks(*args)]


def _label(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function(LABEL + name):
            return function(*args, **kwargs)

    return labelled


def main() -> None:
    """Print the breakdown of one pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__)
    parser.add_argument("--pos", type=int, default=1246)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--passes", type=int, default=3, help="of which the fastest is shown")
    options = parser.parse_args()
    setting = Setting(VL_2B, options.layers, options.pos, options.dtype)
    made = workloads(setting, ("plain", "mine"), "cpu")
    seconds = measure.in_turn(made, 3)
    passes = [breakdown(made["mine"]) for _ in range(options.passes)]
    times = min(passes, key=lambda one: sum(one.values()))
    total = sum(times.values())
    table = Table(
        title=f"{options.layers} layers of {VL_2B.name}, T={options.pos}, {options.dtype}: "
        f"mining {median(seconds['mine']):.2f} s, "
        f"plain {median(seconds['plain']):.2f} s, {torch.get_num_threads()} threads"
    )
    for column in ("part", "operation", "ms", "share"):
        table.add_column(column, justify="left" if column in ("part", "operation") else "right")
    parts: dict[str, float] = defaultdict(float)
    for (part, _), taken in times.items():
        parts[part] += taken
    for part in sorted(parts, key=lambda part: -parts[part]):
        table.add_row(part, "", f"{parts[part]:.1f}", f"{parts[part] / total:.1%}")
        own = [(o, taken) for (p, o), taken in times.items() if p == part]
        for operation, taken in sorted(own, key=lambda one: -one[1]):
            if taken > 0.005 * total:
                table.add_row("", operation, f"{taken:.1f}", f"{taken / total:.1%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
