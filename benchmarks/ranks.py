"""Throughput of two ranks against one, each with a core, on the organism.

    python -m benchmarks.ranks --samples 600 --repeats 5

Starts torchrun for each number of ranks in turn; timed is `ml.mine` alone, without loading, until
rank 0 has the result. One thread in each process. Prints JSON: wall-clock seconds, and the CPU
seconds of the busiest rank, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from typing import Any

MARK = "took "


def work(samples: int, batch_size: str) -> None:
    """One rank."""
    import torch

    import miner_lens as ml

    torch.set_num_threads(1)
    model = ml.load("shapes", device="cpu")
    data = ml.datasets.load("easy-vqa", limit=samples, ask="both")
    size: Any = batch_size if batch_size == "auto" else int(batch_size)
    ml.mine(model, data[:60], batch_size=size, progress=False)
    wall, cpu = time.perf_counter(), time.process_time()
    ml.mine(model, data, batch_size=size, progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(MARK + json.dumps([wall, cpu]), flush=True)


def launch(world: int, samples: int, batch_size: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of the slowest of so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world), "-m", "benchmarks.ranks"]
    command += ["--work", "--samples", str(samples), "--batch-size", batch_size]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=threads)
    took = [json.loads(found) for found in re.findall(rf"{MARK}(\[.*?\])", output.stdout)]
    return max(wall for wall, _ in took), max(cpu for _, cpu in took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--batch-size", default="4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.samples, options.batch_size)
        return
    took: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(options.repeats):
        for world, times in took.items():
            times.append(launch(world, options.samples, options.batch_size))
    result: dict[str, Any] = {
        "samples": options.samples,
        "batch_size": options.batch_size,
        "cores": os.cpu_count(),
    }
    for index, clock in enumerate(("wall", "cpu")):
        one, two = ([times[index] for times in took[world]] for world in (1, 2))
        ratios = [a / b for a, b in zip(one, two, strict=True)]
        result[clock] = {
            "seconds_one_rank": one,
            "seconds_two_ranks": two,
            "samples_per_second_one_rank": options.samples / statistics.median(one),
            "samples_per_second_two_ranks": options.samples / statistics.median(two),
            "speedup": statistics.median(ratios),
            "speedup_by_pair": ratios,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
