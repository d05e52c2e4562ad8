"""All rows of the benchmark, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from benchmarks import preparing, scaling, startup, tables
from benchmarks.comparisons import Comparison, Row, Setting
from benchmarks.measure import fast_bfloat16
from benchmarks.models import AUDIO_7B, VL_2B, Shape
from benchmarks.results import Result, Target

QUESTION = 305  # an image of 256 tokens and a question
SPOKEN = 790  # a clip of 30 seconds and a question


class Group(Protocol):
    """Rows that are measured together."""

    @property
    def slow(self) -> bool:
        """Whether it takes so long on this machine that it has to be asked for."""
        ...

    def names(self) -> list[str]:
        """The rows' names."""
        ...

    def steps(self, wanted: Iterable[str], runs: int) -> int:
        """How many calls measuring these rows takes."""
        ...

    def measure(
        self, wanted: Iterable[str], runs: int, device: str, tick: Callable[[], object]
    ) -> Iterator[Result]:
        """Measure the rows of these names."""
        ...


def catalogue(device: str) -> list[Group]:
    """The rows, in groups, sized for the device."""
    return [
        *(group for dtype in ("fp32", "bf16") for group in _comparisons(dtype, device)),
        *preparing.catalogue(),
        *tables.catalogue(),
        *startup.catalogue(),
        *scaling.catalogue(),
    ]


def _comparisons(dtype: str, device: str) -> list[Comparison]:
    emulated = dtype == "bf16" and not fast_bfloat16(device)

    def setting(shape: Shape, pos: int, layers: int, on_gpu: int, batch: int = 1) -> Setting:
        """With enough layers for a pass to dwarf what is paid once per pass, and no more."""
        chosen = on_gpu if device.startswith("cuda") else 1 if emulated else layers
        return Setting(shape, chosen, pos, dtype, batch)

    def against_plain(
        where: int | str, target: Target | None = None, extra_target: Target | None = None
    ) -> Row:
        return Row(f"mine-plain-{where}-{dtype}", "mine", "plain", target, extra_target)

    def at(pos: int, layers: int, *targets: Target) -> list[Comparison]:
        light = (
            against_plain(pos, *targets),
            Row(f"attention-free-plain-{pos}-{dtype}", "attention-free", "plain", Target(1.04)),
            Row(f"ablate-plain-{pos}-{dtype}", "ablate", "plain", Target(1.02)),
        )
        dense = (
            Row(f"published-plain-{pos}-{dtype}", "published", "plain"),
            Row(f"published-mine-{pos}-{dtype}", "published", "mine", Target(2, at_least=True)),
            Row(f"naive-plain-{pos}-{dtype}", "naive", "plain"),
        )
        here = setting(VL_2B, pos, layers, on_gpu=28)
        if emulated:
            return [Comparison(here, light), Comparison(here, dense, slow=True)]
        return [Comparison(here, light + dense)]

    ratio, extra = Target(1.6 if dtype == "bf16" else 1.25), Target(150)
    memory = f"memory-8192-{dtype}"
    longest = Row(memory, "mine", "plain", extra_target=Target(600), timed=False)
    return [
        *at(1246, 4, ratio, extra),
        *at(4096, 1),
        Comparison(setting(VL_2B, 8192, 1, on_gpu=1), (longest,), slow=emulated),
        *(
            Comparison(
                setting(VL_2B, QUESTION, 2, on_gpu=28, batch=batch),
                (against_plain(f"batch{batch}"),),
                slow=emulated and batch > 4,
            )
            for batch in (1, 4, 16)
        ),
        Comparison(
            setting(AUDIO_7B, SPOKEN, 2, on_gpu=8), (against_plain("audio"),), slow=emulated
        ),
    ]
