"""What all analyzers cost in one run, beside each by itself: time, hook points read, memory.

    OMP_NUM_THREADS=1 python -m benchmarks.together --model smol-vl --samples 32

Prints JSON. Each analyzer runs by itself over the data, and all of them together in one run, in
turn; so do two that do nothing, one without gradients and one with. An analyzer's own time is its
run's less that of the plain passes (without gradients, so that the backward pass is its own). It
is to hold that one run of all takes no longer than the plain passes and the sum of their own times;
that each hook point is read once in each pass; and that all of them use less than 1.5 GB beyond
what the model itself takes. Times are CPU seconds (on a GPU, wall-clock); memory is measured in
processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.utils import logging

import miner_lens as ml
from benchmarks.measure import NO_CACHING, Spread, in_turn, peak_memory, ratio
from miner_lens.models.description import describe

MOST_MB = 1_500.0
TOGETHER, PLAIN, BACKWARD = "together", "plain", "plain and back"
Make = Callable[[], "ml.Analyzer[Any]"]


class Nothing(ml.Analyzer[None]):
    """Reads one point and does nothing with it: a plain pass, as `run` makes it."""

    def points(self, model: Any) -> list[ml.Point]:
        return ml.residual_points(model)[-1:]

    def see(self, x: torch.Tensor, point: ml.Point, batch: ml.Batch, *gradient: Any) -> None:
        pass

    def result(self) -> None:
        pass


class NothingBack(Nothing):
    """The same with a backward pass."""

    needs_gradients = True


def analyzers(model: Any) -> dict[str, Make]:
    """What makes each analyzer that fits the model, by name."""
    sites = {site.name: site.modalities for site in describe(model).sites}
    medium = next((name for name in sites["llm"] if name in ("image", "audio")), None)
    made: dict[str, Make] = {
        "attribution": ml.AttributionAnalyzer,
        "attention flow": ml.AttentionFlowAnalyzer,
        "contribution": ml.ContributionAnalyzer,
        "convergence": ml.ConvergenceAnalyzer,
        "logit lens": ml.LogitLensAnalyzer,
        "semantic reach": ml.SemanticReachAnalyzer,
        "top activations": partial(ml.TopActivationsAnalyzer, 0, 0),
        "tuned lens": ml.TunedLensAnalyzer,
    }
    for site in sites:
        made[f"importance, {site}"] = partial(ml.ImportanceAnalyzer, site=site)
        made[f"domains, {site}"] = partial(ml.DomainAnalyzer, site)
    if medium is not None:
        made["kinds"] = partial(ml.KindAnalyzer, medium)
    return made


def workloads(model: Any, data: Any, batch_size: int) -> dict[str, Callable[[], object]]:
    """One run for each analyzer, one of all, and plain ones."""
    made = analyzers(model)

    def going(*some: Make) -> Callable[[], object]:
        return lambda: ml.run(
            model, data, *(one() for one in some), batch_size=batch_size, progress=False
        )

    alone = {name: going(make) for name, make in made.items()}
    plain = {PLAIN: going(Nothing), BACKWARD: going(NothingBack)}
    return {TOGETHER: going(*made.values()), **plain, **alone}


def readings(model: Any, data: Any, batch_size: int) -> dict[str, Any]:
    """How often each hook point that is read fires in a pass of one run of all."""
    made = [make() for make in analyzers(model).values()]
    fired: Counter[str] = Counter()
    calls: list[int] = []
    names = {point.name for one in made for point in one.points(model) if point.site == "llm"}

    def count(x: torch.Tensor, hook: Any) -> None:
        fired[hook.name] += 1

    handle = model.original_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with model.hooks(fwd_hooks=[(name, count) for name in names]):
            ml.run(model, data, *made, batch_size=batch_size, progress=False)
    finally:
        handle.remove()
    by_pass = {name: fired[name] / len(calls) for name in names}
    return {
        "passes": len(calls),
        "points": len(names),
        "most_readings_of_a_point_in_a_pass": max(by_pass.values()),
        "least_readings_of_a_point_in_a_pass": min(by_pass.values()),
    }


def load(name: str, data: str, samples: int, device: str) -> tuple[Any, Any]:
    """The model, and samples with labels."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    kind, _, ask = data.partition(":")
    found = ml.datasets.load(kind, limit=samples, ask=ask or None)
    half = max(1, len(found) // 2)
    return ml.load(name, device=device), {"first": found[:half], "second": found[half:]}


def peak(options: argparse.Namespace, what: str) -> float:
    """Peak memory of a workload beyond the model's, in MB, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.together", "--peak", what, *sys.argv[1:]],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | NO_CACHING,
    )
    return float(done.stdout.splitlines()[-1])


def compare(times: dict[str, list[float]]) -> dict[str, Any]:
    """What the times say: each analyzer's own, their sum, and whether one run keeps within it."""
    runs = range(len(times[PLAIN]))
    names = [name for name in times if name not in (TOGETHER, PLAIN, BACKWARD)]
    own = {name: [times[name][n] - times[PLAIN][n] for n in runs] for name in names}
    bound = [times[PLAIN][n] + sum(own[name][n] for name in names) for n in runs]
    within = ratio(times[TOGETHER], bound)
    return {
        "seconds": {name: Spread.of(some).median for name, some in times.items()},
        "own_seconds": {name: Spread.of(some).median for name, some in own.items()},
        "together_by_plain_and_own": vars(within),
        "together_by_plain": vars(ratio(times[TOGETHER], times[PLAIN])),
        "within_the_sum": within.median <= 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.together", description=__doc__)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--data", default="easy-vqa:both")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, data = load(options.model, options.data, options.samples, options.device)
    made = workloads(model, data, options.batch_size)
    if options.peak is not None:
        few = {name: some[:1] for name, some in data.items()}
        workloads(model, few, options.batch_size)[options.peak]()  # loads the code
        print(peak_memory(made[options.peak], options.device))
        return
    # Of a CPU's time other work on the machine takes none away.
    clock = time.perf_counter if options.device.startswith("cuda") else time.process_time
    found: dict[str, Any] = {
        "model": options.model,
        "samples": options.samples,
        "batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        **readings(model, data, options.batch_size),
        **compare(in_turn(made, options.runs, options.device, clock=clock)),
    }
    peaks = {f"peak_mb_{name}": peak(options, name) for name in (TOGETHER, PLAIN)}
    within = peaks[f"peak_mb_{TOGETHER}"] <= MOST_MB
    print(json.dumps(found | peaks | {"within_1500_mb": within}, indent=1))


if __name__ == "__main__":
    main()
