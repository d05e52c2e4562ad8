"""Whether the time of a sample, or memory, grows with the number of samples: `run` on the organism.

    OMP_NUM_THREADS=1 python -m benchmarks.steady --samples 5000

Prints JSON: seconds per sample and resident memory by hundreds of samples, and how much the fitted
line rises over the whole run. The first hundred, in which caches fill, is left out of the fit. Both
wall-clock and CPU seconds are given; other work on the machine disturbs the latter less. As a
machine's speed drifts, a few plain forward passes of one prompt are timed at each hundred, and the
time per sample is also given as a multiple of theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import psutil
import torch

import miner_lens as ml

EVERY, PLAIN = 100, 20


def measure(samples: int, batch_size: Any) -> dict[str, Any]:
    """Mine so many samples, noting time and memory at each hundredth."""
    model = ml.load("shapes", device="cpu")
    data = ml.datasets.load("easy-vqa", limit=samples, ask="both")
    process = psutil.Process()
    times: list[float] = []
    cpu: list[float] = []
    memory: list[float] = []
    plain: list[float] = []
    prompt = ml.inputs(model, data[0].messages)
    lost = lost_cpu = 0.0

    def noting() -> Iterator[ml.Sample]:
        nonlocal lost, lost_cpu
        for index, sample in enumerate(data):
            if index % EVERY == 0:
                times.append(time.perf_counter() - lost)
                cpu.append(time.process_time() - lost_cpu)
                memory.append(process.memory_info().rss / 1e6)
                before, before_cpu = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    for _ in range(PLAIN):
                        model(**prompt)
                plain.append((time.perf_counter() - before) / PLAIN)
                lost += time.perf_counter() - before
                lost_cpu += time.process_time() - before_cpu
            yield sample

    ml.mine(model, noting(), batch_size=batch_size, progress=False)
    per_sample = [(b - a) / EVERY for a, b in pairwise(times)]
    cpu_per_sample = [(b - a) / EVERY for a, b in pairwise(cpu)]
    speeds = [(a + b) / 2 for a, b in pairwise(plain)]
    by_plain = [seconds / speed for seconds, speed in zip(per_sample, speeds, strict=True)]
    return {
        "samples": len(data),
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "seconds_per_sample": [round(seconds, 5) for seconds in per_sample],
        "cpu_seconds_per_sample": [round(seconds, 5) for seconds in cpu_per_sample],
        "resident_mb": [round(size, 1) for size in memory],
        "median_seconds_per_sample": statistics.median(per_sample),
        "rise_of_time_over_the_run": rise(per_sample[1:]) / statistics.median(per_sample),
        "rise_of_cpu_time_over_the_run": rise(cpu_per_sample[1:])
        / statistics.median(cpu_per_sample),
        "rise_of_plain_time_over_the_run": rise(speeds[1:]) / statistics.median(speeds),
        "rise_of_time_in_plain_passes_over_the_run": rise(by_plain[1:])
        / statistics.median(by_plain),
        "rise_of_memory_over_the_run_mb": rise(memory[1:]),
    }


def rise(values: list[float]) -> float:
    """By how much the line fitted to the values rises from the first to the last.

    The slope is Theil and Sen's, the median over all pairs, which a few slow moments of a busy
    machine do not bend.
    """
    pairs = [(i, j) for i in range(len(values)) for j in range(i + 1, len(values))]
    if not pairs:
        return 0.0
    slope = statistics.median((values[j] - values[i]) / (j - i) for i, j in pairs)
    return slope * (len(values) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--batch-size", default="1")
    options = parser.parse_args()
    size = options.batch_size if options.batch_size == "auto" else int(options.batch_size)
    print(json.dumps(measure(options.samples, size)))


if __name__ == "__main__":
    main()
