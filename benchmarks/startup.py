"""What a user waits for before anything happens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks import measure
from benchmarks.results import Result

HELP = "from miner_lens.cli import app; app(['--help'], prog_name='miner-lens')"


@dataclass(frozen=True)
class Startup:
    """The time of one Python process as a share of another's."""

    name: str
    measures: str
    top: str
    bottom: str
    slow: bool = False

    def names(self) -> list[str]:
        """The row's name."""
        return [self.name]

    def steps(self, wanted: Iterable[str], runs: int) -> int:
        """How many processes measuring it takes."""
        return 2 * (runs + 1)

    def measure(
        self, wanted: Iterable[str], runs: int, device: str, tick: Callable[[], object]
    ) -> Iterator[Result]:
        """Measure it; the first start, from a cold disk cache, does not count."""
        pair = {"top": lambda: _python(self.top), "bottom": lambda: _python(self.bottom)}
        times = measure.in_turn(pair, runs, tick=tick)
        seconds = {name: median(values) for name, values in times.items()}
        yield Result(
            name=self.name,
            measures=self.measures,
            setting={"seconds": f"{seconds['top']:.2f} / {seconds['bottom']:.2f}"},
            value=measure.ratio(times["top"], times["bottom"]),
            seconds=seconds,
        )


def catalogue() -> list[Startup]:
    """Import of the package, import of what mining needs, and the command's help."""
    return [
        Startup("startup-import", "import miner_lens / torch", "import miner_lens", "import torch"),
        Startup(
            "startup-mine",
            "import miner_lens, look up mine / import torch",
            "import miner_lens; miner_lens.mine",
            "import torch",
        ),
        Startup("startup-help", "miner-lens --help / python -c pass", HELP, "pass"),
    ]


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
