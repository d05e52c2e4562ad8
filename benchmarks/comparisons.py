"""Rows that compare one way of running a model with another on the same inputs and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

import miner_lens as ml
from benchmarks import measure, models
from benchmarks.measure import Workload
from benchmarks.published import naive, published
from benchmarks.results import Result, Target
from miner_lens.models.access import identity

ABLATED = 0.02
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORDS = {
    "plain": "plain sdpa forward",
    "mine": "mining",
    "attention-free": "mining prob, mean and max",
    "published": "published procedure",
    "naive": "run_with_cache and dense arithmetic",
    "ablate": f"forward with {ABLATED:.0%} of the neurons ablated",
}


@dataclass(frozen=True)
class Setting:
    """A model and its inputs."""

    shape: models.Shape
    layers: int
    pos: int
    dtype: str
    batch: int = 1

    def describe(self) -> dict[str, Any]:
        """For the table and the file."""
        return {
            "model": self.shape.name,
            "layers": self.layers,
            "T": self.pos,
            "batch": self.batch,
            "dtype": self.dtype,
        }

    def flops(self) -> float:
        """Operations of a plain forward pass."""
        return self.batch * self.layers * models.layer_flops(self.shape, self.pos)


@dataclass(frozen=True)
class Row:
    """What one row compares; `timed` is False where only memory is measured."""

    name: str
    top: str
    bottom: str
    target: Target | None = None
    extra_target: Target | None = None
    timed: bool = True


@dataclass(frozen=True)
class Comparison:
    """Rows in one setting, measured together so that they share what they have in common."""

    setting: Setting
    rows: tuple[Row, ...]
    slow: bool = False

    def names(self) -> list[str]:
        """The rows' names."""
        return [row.name for row in self.rows]

    def steps(self, wanted: Iterable[str], runs: int) -> int:
        """How many calls measuring these rows takes."""
        chosen = self._chosen(wanted)
        timed = _workloads_of(row for row in chosen if row.timed)
        return len(timed) * (runs + 1) + 1

    def measure(
        self, wanted: Iterable[str], runs: int, device: str, tick: Callable[[], object]
    ) -> Iterator[Result]:
        """Measure the rows of these names."""
        chosen = self._chosen(wanted)
        timed = _workloads_of(row for row in chosen if row.timed)
        times = measure.in_turn(workloads(self.setting, timed, device), runs, device, tick)
        peaks = peaks_of(self.setting, _workloads_of(chosen), device)
        tick()
        for row in chosen:
            pair = (row.top, row.bottom)
            value = measure.ratio(times[row.top], times[row.bottom]) if row.timed else None
            yield Result(
                name=row.name,
                measures=f"{WORDS[row.top]} / {WORDS[row.bottom]}",
                setting=self.setting.describe(),
                value=value,
                target=row.target,
                seconds={name: median(times[name]) for name in pair if row.timed},
                peak_mb={name: peaks[name] for name in pair},
                extra_mb=peaks[row.top] - peaks[row.bottom],
                extra_target=row.extra_target,
            )

    def _chosen(self, wanted: Iterable[str]) -> list[Row]:
        names = set(wanted)
        return [row for row in self.rows if row.name in names]


def workloads(setting: Setting, names: Iterable[str], device: str) -> dict[str, Workload]:
    """Calls without arguments. Every model in them has the same weights, not copies of them.

    Plain forwards and the published procedure run on the Hugging Face model that nothing has
    wrapped or hooked.
    """
    names = list(names)
    dtype = DTYPES[setting.dtype]
    inputs, masks = models.prompt(setting.shape, setting.pos, setting.batch, dtype, device)
    plain = models.build(setting.shape, setting.layers, dtype, device)
    bridge: Any = ml.wrap(models.twin(plain))
    options = models.prefill_options(plain)
    chosen = _random_neurons(bridge, setting)

    def forward() -> object:
        with torch.no_grad():
            return plain(**inputs, **options)

    def ablate() -> object:
        with torch.no_grad(), ml.ablate(bridge, chosen):
            return bridge.original_model(**inputs, **options)

    made: dict[str, Workload] = {
        "plain": forward,
        "mine": lambda: ml.mine(bridge, [(inputs, masks)], progress=False),
        "attention-free": lambda: ml.mine(
            bridge, [(inputs, masks)], progress=False, metrics=("prob", "mean", "max")
        ),
        "published": lambda: published(plain, inputs, masks),
        "naive": lambda: naive(bridge, inputs, masks),
        "ablate": ablate,
    }
    return {name: made[name] for name in names}


def measure_peaks(asked: dict[str, Any], device: str) -> str:
    """Peak memory of each workload that a request names; for a process of its own."""
    shape = models.Shape(**asked["setting"].pop("shape"))
    setting = Setting(shape=shape, **asked["setting"])
    _load_code(setting, asked["names"], device)
    made = workloads(setting, asked["names"], device)
    return json.dumps({name: measure.peak_memory(made[name], device) for name in made})


def _load_code(setting: Setting, names: list[str], device: str) -> None:
    """Run every workload once, and keep nothing of the size that is to be measured."""
    small = replace(setting, layers=1, pos=min(setting.pos, 800), batch=1)
    for workload in workloads(small, names, device).values():
        workload()


def peaks_of(setting: Setting, names: list[str], device: str) -> dict[str, float]:
    asked = {"setting": vars(setting) | {"shape": vars(setting.shape)}, "names": names}
    command = [sys.executable, "-m", "benchmarks", "--device", device]
    done = subprocess.run(
        [*command, "--peaks", json.dumps(asked)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | measure.NO_CACHING,
    )
    peaks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def _workloads_of(rows: Iterable[Row]) -> list[str]:
    """The workloads of these rows, each once, in a fixed order."""
    needed = {name for row in rows for name in (row.top, row.bottom)}
    return [name for name in WORDS if name in needed]


def _random_neurons(bridge: Any, setting: Setting) -> ml.NeuronSet:
    total = setting.layers * setting.shape.neurons
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(total, dtype=torch.bool)
    mask[chosen[: round(ABLATED * total)]] = True
    mask = mask.view(setting.layers, setting.shape.neurons)
    return ml.NeuronSet.from_mask(mask, identity=identity(bridge))
