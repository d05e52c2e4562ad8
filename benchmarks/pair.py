"""Rows that compare two calls made for them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks import measure
from benchmarks.measure import Workload
from benchmarks.results import Result


@dataclass(frozen=True)
class Pair:
    """The time of one call as a share of another's.

    Attributes:
        name: The row's name.
        measures: What is compared, for the table.
        make: Gives the two calls, the one above the line first, for a device.
        setting: What else the table says.
        slow: Whether it has to be asked for.
    """

    name: str
    measures: str
    make: Callable[[str], tuple[Workload, Workload]]
    setting: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False

    def names(self) -> list[str]:
        """The row's name."""
        return [self.name]

    def steps(self, wanted: Iterable[str], runs: int) -> int:
        """How many calls measuring it takes."""
        return 2 * (runs + 1)

    def measure(
        self, wanted: Iterable[str], runs: int, device: str, tick: Callable[[], object]
    ) -> Iterator[Result]:
        """Measure it; the first call of each does not count."""
        top, bottom = self.make(device)
        times = measure.in_turn({"top": top, "bottom": bottom}, runs, device, tick)
        seconds = {name: median(values) for name, values in times.items()}
        shown = f"{seconds['top']:.2f} / {seconds['bottom']:.2f}"
        yield Result(
            name=self.name,
            measures=self.measures,
            setting={**self.setting, "seconds": shown},
            value=measure.ratio(times["top"], times["bottom"]),
            seconds=seconds,
        )
