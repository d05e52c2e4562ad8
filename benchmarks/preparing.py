"""What it saves to prepare samples while the model is busy."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

import miner_lens as ml
from benchmarks.measure import Workload
from benchmarks.pair import Pair
from miner_lens.models.access import layout
from miner_lens.models.generation import prepare_inputs

SAMPLES = 40
PIXELS = (980, 960)


def catalogue() -> list[Pair]:
    """Mining photographs, as a share of preparing them first and mining them then."""
    return [
        Pair(
            "mine-photographs",
            "mining / preparing all samples, then mining them",
            lambda device: workloads(ml.load("shapes", device=device), SAMPLES),
            {"model": "shapes", "samples": SAMPLES, "JPEG": "{} x {}".format(*PIXELS)},
        )
    ]


def workloads(model: Any, samples: int) -> tuple[Workload, Workload]:
    """Mining photographs that are prepared meanwhile, and that were prepared before."""
    data = [_photograph(number) for number in range(samples)]

    def prepared() -> Iterator[Any]:
        for sample in data:
            inputs = prepare_inputs(model, [sample.messages])
            yield inputs, layout(model).masks(inputs["input_ids"], inputs["attention_mask"])

    return (
        lambda: ml.mine(model, data, progress=False),
        lambda: ml.mine(model, list(prepared()), progress=False),
    )


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
