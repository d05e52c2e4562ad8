"""How things are measured: in turn, as ratios, and memory apart from time."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Workload = Callable[[], object]
Clock = Callable[[], float]

# Given to the processes that measure memory, so that freed memory goes back to the system at once:
# what an allocator keeps would hide the next use of it.
NO_CACHING = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MKL_DISABLE_FAST_MM": "1",
}


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of what was measured in each run."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high, len(values))


def seconds(workload: Workload, device: str, clock: Clock = time.perf_counter) -> float:
    """How long one call takes, until the device has finished."""
    gc.collect()  # what the call before has left is not this one's to clear away
    _synchronise(device)
    start = clock()
    workload()
    _synchronise(device)
    return clock() - start


def in_turn(
    workloads: Mapping[str, Workload],
    runs: int,
    device: str = "cpu",
    tick: Callable[[], object] = lambda: None,
    clock: Clock = time.perf_counter,
    first: Mapping[str, Workload] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each workload in each run, after one call of each that does not count.

    What takes minutes is given smaller ones, `first`, to call before.

    Every run calls all of them. Their order changes from run to run so that each of them is early
    and late, and comes after each of the others, equally often (a Williams design): a machine that
    slows down, or something that one leaves behind for the next, weighs on none in particular.
    """
    for name in workloads:
        (first or workloads)[name]()
        tick()
    times: dict[str, list[float]] = {name: [] for name in workloads}
    for run in range(runs):
        for name in order(list(workloads), run):
            times[name].append(seconds(workloads[name], device, clock))
            tick()
    return times


def order(names: Sequence[str], run: int) -> list[str]:
    """The order of a run in a Williams design, which is complete after 1 or 2 times n runs."""
    count = len(names)
    zigzag = [
        (place + 1) // 2 if place % 2 else (count - place // 2) % count for place in range(count)
    ]
    ordered = [names[(place + run) % count] for place in zigzag]
    return ordered[::-1] if count % 2 and run // count % 2 else ordered


def ratio(top: Sequence[float], bottom: Sequence[float]) -> Spread:
    """The spread of the ratio, run by run."""
    return Spread.of([a / b for a, b in zip(top, bottom, strict=True)])


def exponent(sizes: Sequence[float], times: Mapping[float, Sequence[float]]) -> Spread:
    """The spread of b in `seconds = a size^b`, fitted run by run."""
    by_run = zip(*(times[size] for size in sizes), strict=True)
    slopes = [np.polyfit(np.log(sizes), np.log(run), 1)[0] for run in by_run]
    return Spread.of([float(slope) for slope in slopes])


def peak_memory(workload: Workload, device: str) -> float:
    """Most memory that one call uses beyond what was in use before it, in MB of 10^6 bytes.

    On a CPU this is resident memory, whose largest value the kernel keeps (Linux only); call it
    in a process that was started with `NO_CACHING`.
    """
    before, largest = memory(workload, device)
    return largest - before


def memory(workload: Workload, device: str) -> tuple[float, float]:
    """What was in use before a call, and the most that was while it ran; as `peak_memory`."""
    gc.collect()  # what is collected later would make up for what the call uses
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        workload()
        _synchronise(device)
        return held / 1e6, torch.cuda.max_memory_allocated() / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the largest value becomes the present one
    before = _status("VmHWM")
    workload()
    return before / 1e6, _status("VmHWM") / 1e6


def environment(device: str) -> dict[str, Any]:
    """What figures depend on: cores, threads, instructions and versions, but no names."""
    packages = ("torch", "transformers", "transformer-lens", "miner-lens", "numpy")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": "native" if fast_bfloat16(device) else "emulated",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found | {package: version(package) for package in packages}


def fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 itself; otherwise it takes many times fp32's time."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _status(name: str) -> int:
    """A size that the kernel keeps of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel keeps no {name}")
