"""What it saves to prepare samples while the model is busy."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL import Image

import miner_lens as ml
from benchmarks import measure
from benchmarks.measure import Workload
from benchmarks.results import Result
from miner_lens.generation import prepare_inputs
from miner_lens.models import layout

SAMPLES = 40
PIXELS = (980, 960)


@dataclass(frozen=True)
class Preparing:
    """Mining photographs, as a share of preparing them first and mining them then."""

    name: str = "mine-photographs"
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
        """Measure it on the organism `shapes`."""
        model = ml.load("shapes", device=device)
        times = measure.in_turn(workloads(model, SAMPLES), runs, device, tick)
        yield Result(
            name=self.name,
            measures="mining / preparing all samples, then mining them",
            setting={"model": "shapes", "samples": SAMPLES, "JPEG": "{} x {}".format(*PIXELS)},
            value=measure.ratio(times["beside"], times["before"]),
            seconds={name: median(values) for name, values in times.items()},
        )


def workloads(model: Any, samples: int) -> dict[str, Workload]:
    """Both ways of mining the same photographs."""
    data = [_photograph(number) for number in range(samples)]

    def prepared() -> Iterator[Any]:
        for sample in data:
            inputs = prepare_inputs(model, [sample.messages])
            yield inputs, layout(model).masks(inputs["input_ids"], inputs["attention_mask"])

    return {
        "beside": lambda: ml.mine(model, data, progress=False),
        "before": lambda: ml.mine(model, list(prepared()), progress=False),
    }


def _photograph(number: int) -> ml.Sample:
    """A question about a JPEG with detail of several sizes."""
    generator = torch.Generator().manual_seed(number)
    image = Image.new("RGB", PIXELS)
    for cells in (8, 64, 512):
        noise = torch.randint(256, (cells, cells, 3), generator=generator, dtype=torch.uint8)
        layer = Image.fromarray(noise.numpy()).resize(PIXELS, Image.Resampling.BICUBIC)
        image = Image.blend(image, layer, 0.5)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    content = [
        {"type": "image", "image": file.getvalue()},
        {"type": "text", "text": "what is it?"},
    ]
    return ml.Sample([{"role": "user", "content": content}], (), f"photograph {number}")
