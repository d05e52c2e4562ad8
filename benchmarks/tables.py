"""Rows that compare a table of trials with the published way of asking under conditions.

The published way asks one sample at a time: hooks write zeros, and Hugging Face's `generate` makes
at most 128 tokens, stopping at the end of the turn. Towers run for each sample and condition.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

import miner_lens as ml
from benchmarks import measure
from benchmarks.measure import Workload
from benchmarks.models import twin
from benchmarks.results import Result, Target
from miner_lens import organisms

MINED, TOKENS = 8, 128
PUBLISHED = "published"
WORDS = {
    "trials": "a table of trials",
    "answers": "a table of trials with answers",
    PUBLISHED: "the published way",
}
ROWS = {"published-trials": "trials", "published-answers": "answers"}
FASTER, LARGER = Target(3, at_least=True), 0.2


@dataclass(frozen=True)
class Size:
    """How large a table is, and of which organism's answers to easy-VQA."""

    model: str
    conditions: int
    samples: int


@dataclass(frozen=True)
class Table:
    """The published way beside `ml.trials`, which reads the answers, and has the model give them.

    Its memory is all that a process holds at most, the model included.
    """

    size: Size
    slow: bool = True

    def names(self) -> list[str]:
        """The rows' names."""
        return list(ROWS)

    def steps(self, wanted: Iterable[str], runs: int) -> int:
        """How many calls measuring these rows takes."""
        return len(_needed(wanted)) * (runs + 1) + 1

    def measure(
        self, wanted: Iterable[str], runs: int, device: str, tick: Callable[[], object]
    ) -> Iterator[Result]:
        """Measure the rows of these names."""
        wanted = list(wanted)
        needed = _needed(wanted)
        made = workloads(self.size, device)
        small = workloads(replace(self.size, conditions=2, samples=2), device)
        times = measure.in_turn(
            {name: made[name] for name in needed}, runs, device, tick, first=small
        )
        peaks = {name: peak_of(self.size, name, device) for name in needed}
        tick()
        for name in wanted:
            ours = ROWS[name]
            yield Result(
                name=name,
                measures=f"{WORDS[PUBLISHED]} / {WORDS[ours]}",
                setting=asdict(self.size),
                value=measure.ratio(times[PUBLISHED], times[ours]),
                target=FASTER,
                seconds={one: median(times[one]) for one in (PUBLISHED, ours)},
                peak_mb={one: peaks[one] for one in (ours, PUBLISHED)},
                extra_mb=peaks[ours] - peaks[PUBLISHED],
                extra_target=Target(round(LARGER * peaks[PUBLISHED])),
            )


def catalogue() -> list[Table]:
    """The table of twenty conditions, which takes minutes."""
    return [Table(Size("smol-vl", conditions=20, samples=64))]


def workloads(size: Size, device: str) -> dict[str, Workload]:
    """Calls without arguments, on models that share their weights.

    Each returns how right every answer is, [condition sample].
    """
    path = str(organisms.path(size.model))
    plain: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype="auto")
    plain = plain.to(device).eval()
    processor: Any = transformers.AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]
    bridge: Any = ml.wrap(twin(plain), processor)
    data = ml.datasets.load("easy-vqa", limit=size.samples + MINED)
    scores = ml.mine(bridge, data[:MINED], batch_size=MINED, progress=False)
    intact, *others = ml.experiments.ablation_plan(scores).conditions
    conditions = [intact, *others[1 - size.conditions :]]
    asked = data[MINED:]
    return {
        PUBLISHED: lambda: published(plain, processor, asked, conditions),
        "trials": lambda: ml.trials(bridge, asked, conditions, progress=False).correct,
        "answers": lambda: (
            ml.trials(
                bridge, asked, conditions, progress=False, metric=_right, max_new_tokens=TOKENS
            ).correct
        ),
    }


def published(
    model: Any, processor: Any, data: Sequence[ml.Sample], conditions: Sequence[ml.Condition]
) -> list[list[float]]:
    """How right each answer of a plain Hugging Face model is, [condition sample]."""
    found = []
    for condition in conditions:
        with ExitStack() as stack:
            for layer, neurons in _by_layer(condition).items():
                activation = model.get_decoder().layers[layer].mlp.act_fn
                handle = activation.register_forward_hook(_zeros(neurons.to(model.device)))
                stack.callback(handle.remove)
            found.append([_right(one, _answer(model, processor, one)) for one in data])
    return found


def peak_of(size: Size, name: str, device: str) -> float:
    """Most memory that a process of its own holds while it makes one table, in MB."""
    asked = json.dumps({"table": asdict(size), "name": name})
    command = [sys.executable, "-m", "benchmarks", "--device", device, "--peaks", asked]
    env = os.environ | measure.NO_CACHING
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    peak: float = json.loads(done.stdout.splitlines()[-1])
    return peak


def measure_peak(asked: dict[str, Any], device: str) -> str:
    """What `peak_of` asks for; for a process of its own.

    Two conditions hold as much at once as all, and where one sample is asked after the other, a few
    samples as much as all.
    """
    whole = Size(**asked["table"])
    small = replace(whole, conditions=min(2, whole.conditions))
    if asked["name"] == PUBLISHED:
        small = replace(small, samples=min(8, whole.samples))
    _, largest = measure.memory(workloads(small, device)[asked["name"]], device)
    return json.dumps(largest)


def _needed(wanted: Iterable[str]) -> list[str]:
    return [PUBLISHED, *(ROWS[name] for name in wanted)]


def _by_layer(condition: ml.Condition) -> dict[int, Tensor]:
    chosen = condition.neurons
    if not isinstance(chosen, ml.NeuronSet):
        return {}
    return (~chosen if condition.complement else chosen).by_layer()


def _zeros(neurons: Tensor) -> Callable[..., Tensor]:
    def write(module: Any, args: Any, x: Tensor) -> Tensor:
        x[..., neurons] = 0
        return x

    return write


def _answer(model: Any, processor: Any, sample: ml.Sample) -> str:
    inputs = processor.apply_chat_template(
        sample.messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    answer: str = processor.batch_decode(new, skip_special_tokens=True)[0]
    return answer


def _right(sample: ml.Sample, answer: str) -> float:
    return float(answer == sample.answers[0])
