"""How the time of mining grows: fitted exponents, 1 being in proportion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

import miner_lens as ml
from benchmarks import measure, models
from benchmarks.measure import Workload
from benchmarks.results import Result

SMALL = models.Shape("small", "qwen2_vl", 512, 2048, 8, 2)
BASE = {"samples": 1, "layers": 2, "T": 512, "neurons": 2048}
SIZES = {
    "samples": (2, 4, 8, 16),
    "layers": (2, 4, 8, 16),
    "T": (512, 1024, 2048, 4096),
    "neurons": (2048, 4096, 8192, 16384),
}


@dataclass(frozen=True)
class Scaling:
    """The exponent of time in one size, of mining and of plain forwards."""

    axis: str
    sizes: tuple[int, ...]
    base: dict[str, int]
    slow: bool = False

    def names(self) -> list[str]:
        """One row for each of the two."""
        return [f"scaling-{self.axis}-{workload}" for workload in ("mine", "plain")]

    def steps(self, wanted: Iterable[str], runs: int) -> int:
        """How many calls measuring these rows takes."""
        return 2 * len(self.sizes) * (runs + 1)

    def measure(
        self, wanted: Iterable[str], runs: int, device: str, tick: Callable[[], object]
    ) -> Iterator[Result]:
        """Measure both, in turn."""
        made: dict[str, Workload] = {}
        for size in self.sizes:
            pair = _pair(self.base | {self.axis: size}, device)
            made |= {f"{name} {size}": workload for name, workload in pair.items()}
        times = measure.in_turn(made, runs, device, tick)
        for name in ("mine", "plain"):
            if f"scaling-{self.axis}-{name}" not in set(wanted):
                continue
            by_size = {float(size): times[f"{name} {size}"] for size in self.sizes}
            yield Result(
                name=f"scaling-{self.axis}-{name}",
                measures=f"exponent of {'mining' if name == 'mine' else 'plain'} time in "
                f"{self.axis}",
                setting=_describe(self.base | {self.axis: list(self.sizes)}),
                value=measure.exponent(list(by_size), by_size),
                seconds={f"{size:g}": median(by_size[size]) for size in by_size},
            )


def catalogue() -> list[Scaling]:
    """One for each size."""
    return [Scaling(axis, sizes, BASE) for axis, sizes in SIZES.items()]


def _describe(sizes: dict[str, Any]) -> dict[str, Any]:
    shown = {
        axis: size if isinstance(size, int) else f"{size[0]} to {size[-1]}"
        for axis, size in sizes.items()
    }
    return {"model": f"hidden size {SMALL.hidden}", **shown, "dtype": "fp32"}


def _pair(sizes: dict[str, int], device: str) -> dict[str, Workload]:
    shape = replace(SMALL, neurons=sizes["neurons"])
    plain = models.build(shape, sizes["layers"], device=device)
    bridge: Any = ml.wrap(models.twin(plain))
    inputs, masks = models.prompt(shape, sizes["T"], device=device)
    options = models.prefill_options(plain)

    def forward() -> None:
        with torch.no_grad():
            for _ in range(sizes["samples"]):
                plain(**inputs, **options)

    data = [(inputs, masks)] * sizes["samples"]
    return {"mine": lambda: ml.mine(bridge, data, progress=False), "plain": forward}
