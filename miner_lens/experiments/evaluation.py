"""How well a model answers, with whatever is switched off at the moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from miner_lens.data.metrics import is_right
from miner_lens.data.sample import Sample
from miner_lens.models.generation import Inputs, generate_from, prepare_inputs

if TYPE_CHECKING:
    import pandas as pd

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


class Answers(list[str]):
    """A model's answers, in the order of the data, that know which of them are right.

    Example:
        >>> samples = [Sample((), "red", "q1"), Sample((), "red", "q2"), Sample((), (), "q3")]
        >>> Answers(zip(samples, ["red", "blue", "green"])).to_frame()
           id answer  correct
        0  q1    red     True
        1  q2   blue    False
        2  q3  green     <NA>
    """

    def __init__(self, asked: Iterable[tuple[Sample, str]]) -> None:
        # Not the samples themselves, which may hold opened media.
        self._rows = [
            (sample.id, answer, is_right(sample, answer) if sample.answers else None)
            for sample, answer in asked
        ]
        super().__init__(answer for _, answer, _ in self._rows)

    def to_frame(self) -> pd.DataFrame:
        """A table of the columns id, answer and correct, one row a sample.

        `correct` is missing where a sample has no accepted answer, so that its mean is the accuracy
        over the others.
        """
        import pandas as pd

        table = pd.DataFrame(self._rows, columns=["id", "answer", "correct"])
        return table.astype({"correct": "boolean"})


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
) -> Answers:
    """Ask every question and return the greedy answers in the order of the data.

    They are a list; `ml.answers(model, data).to_frame()` is a table that says which are right.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples, mappings with `messages` and `answers`, or what `render` made of them.
        batch_size: Samples in one forward pass.
        max_new_tokens: The length of an answer at most.
    """
    return Answers(
        pair
        for questions in _rendered(model, data, batch_size)
        for pair in zip(
            questions.samples, generate_from(model, questions.inputs, max_new_tokens), strict=True
        )
    )


def accuracy(
    model: Any,
    data: Iterable[Item] | Iterable[Questions],
    batch_size: int = 16,
    max_new_tokens: int = 16,
) -> float:
    """The share of samples whose greedy answer is one of the accepted ones.

    Answers are compared as whole strings, without regard to case and surrounding space. For each
    sample by itself there is `answers(...).to_frame()`.

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
