"""How well a model answers, with whatever is switched off at the moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from miner_lens.data.metrics import is_right
from miner_lens.data.sample import Sample
from miner_lens.models.generation import Inputs, generate_from, prepare_inputs

# A sample, or a mapping that `Sample.of` takes.
Item = Sample | Mapping[str, Any]


@dataclass(frozen=True)
class Questions:
    """A batch of samples rendered once, to be asked many times.

    Attributes:
        samples: The samples.
        inputs: Their left-padded model inputs.
    """

    samples: tuple[Sample, ...]
    inputs: Inputs


def render(model: Any, data: Iterable[Item], batch_size: int = 16) -> Iterator[Questions]:
    """Render samples with the model's processor, `batch_size` at a time."""
    samples = map(Sample.of, data)
    while group := tuple(islice(samples, batch_size)):
        yield Questions(group, prepare_inputs(model, [sample.messages for sample in group]))


def answers(
    model: Any,
    data: Iterable[Item] | Iterable[Questions],
    batch_size: int = 16,
    max_new_tokens: int = 16,
) -> list[str]:
    """Ask every question and return the greedy answers in the order of the data.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples, mappings with `messages` and `answers`, or what `render` made of them.
        batch_size: Samples in one forward pass.
        max_new_tokens: The length of an answer at most.
    """
    return [
        answer
        for questions in _rendered(model, data, batch_size)
        for answer in generate_from(model, questions.inputs, max_new_tokens)
    ]


def accuracy(
    model: Any,
    data: Iterable[Item] | Iterable[Questions],
    batch_size: int = 16,
    max_new_tokens: int = 16,
) -> float:
    """The share of samples whose greedy answer is one of the accepted ones.

    Answers are compared as whole strings, without regard to case and surrounding space.

    Raises:
        ValueError: There are no samples, or one has no accepted answer.
    """
    right = total = 0
    for questions in _rendered(model, data, batch_size):
        given = generate_from(model, questions.inputs, max_new_tokens)
        right += sum(map(is_right, questions.samples, given))
        total += len(given)
    if total == 0:
        raise ValueError("There is no data: the iterable of samples is empty.")
    return right / total


def _rendered(
    model: Any, data: Iterable[Item] | Iterable[Questions], batch_size: int
) -> Iterator[Questions]:
    items: Iterator[Any] = iter(data)
    for first in items:
        if isinstance(first, Questions):
            yield first
        else:
            yield from render(model, [first, *islice(items, batch_size - 1)], batch_size)
