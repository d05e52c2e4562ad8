"""Which samples go through the model together, and what the model is given."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from miner_lens.data.items import prepared_pair
from miner_lens.data.sample import Sample, SampleError
from miner_lens.models.access import layout
from miner_lens.models.collate import collate, fit, kinds
from miner_lens.models.forcing import force
from miner_lens.models.generation import Inputs, awaits_answer, input_device, render, to_device
from miner_lens.running.batch import Batch, prompt_of

BatchSize = int | Literal["auto"]
Thing = TypeVar("Thing")
Made = TypeVar("Made")

# batch_size="auto" packs so many consecutive samples: enough to find company of the same length,
# few enough to hold opened images of. So much of a row may be padding. So many tokens keep a device
# busy; more would only take memory.
WINDOW, PADDING, TOKENS = 32, 0.25, {"cpu": 2_048, "accelerator": 16_384}


@dataclass(frozen=True)
class Item:
    """One item of the data on its way to the model."""

    number: int
    value: Any  # a sample or a prepared pair
    inputs: Inputs | None = None  # a sample's, on the CPU
    answer: tuple[int, ...] = ()  # its tokens, where they are among the inputs, at the end
    error: SampleError | None = None  # why it has none

    @classmethod
    def prepared(cls, model: Any, number: int, value: Any, answered: bool = False) -> Item:
        """An item with the inputs that the processor makes of it, its answer included if wanted.

        Raises:
            ValueError: An answer is wanted, and there is none.
        """
        bare = cls(number, value)
        if not isinstance(value, Sample):
            if answered:
                raise ValueError(
                    f"{bare.name} is a prepared pair, which has no answer whose log-probability "
                    "has a gradient. Give samples with answers, or another objective."
                )
            return bare
        try:
            if answered:
                forced = force(model, value)
                return replace(bare, inputs=forced.inputs, answer=forced.answer)
            awaits = awaits_answer(value.messages)
            return replace(bare, inputs=render(model, [value.messages], awaits))
        except SampleError as error:
            return replace(bare, error=SampleError(f"{bare.name}: {error}"))

    @property
    def name(self) -> str:
        """What error messages call it."""
        return getattr(self.value, "id", None) or f"sample {self.number}"

    @property
    def tokens(self) -> int:
        """How many there are, as far as is known."""
        return 0 if self.inputs is None else self.inputs["input_ids"].shape[1]


class Sampler:
    """Which prepared items go into a pass together.

    What goes together depends on the items of a unit and the limit alone, never on what was run
    before, so a run that was stopped goes on with the same passes.
    """

    def __init__(self, batch_size: BatchSize, device: torch.device) -> None:
        auto = batch_size == "auto"
        self.size = WINDOW if auto else int(batch_size)  # of a unit
        # Tokens in a pass, padding included; a longer sample is a pass by itself.
        self.limit = TOKENS.get(device.type, TOKENS["accelerator"]) if auto else None

    def arrange(self, items: Sequence[Item]) -> list[Item]:
        """The items of a unit in the order in which they are run."""
        if self.limit is None:
            return list(items)
        return sorted(items, key=lambda item: -item.tokens)

    def take(self, pending: Sequence[Item]) -> list[Item]:
        """The next items that go into one pass."""
        first, most, least = pending[0], len(pending), 0.0
        if self.limit is not None and first.tokens:
            most, least = max(1, self.limit // first.tokens), (1 - PADDING) * first.tokens
        taken, known = 0, {} if first.inputs is None else kinds(first.inputs)
        for item in pending[:most]:
            if item.inputs is None or item.tokens < least or not fit(known, kinds(item.inputs)):
                break
            known |= kinds(item.inputs)
            taken += 1
        return list(pending[: taken or 1])

    def lower(self, taken: Sequence[Item]) -> bool:
        """Halve the limit after memory ran out; whether that can be done."""
        if self.limit is None or len(taken) == 1:
            return False
        # Memory that is short for a few samples is short whatever the limit was.
        self.limit = len(taken) // 2 * taken[0].tokens
        return True


def ahead(
    items: Iterable[Thing], prepare: Callable[[Thing], Made]
) -> Generator[tuple[Thing, Made], None, None]:
    """Each item with what `prepare` makes of it, made while the item before it is being used.

    Items are taken by the caller's thread, one ahead; `prepare` runs in a thread of its own. What
    either raises is raised when its turn comes, after the items before it.

    Example:
        >>> list(ahead("ab", str.upper))
        [('a', 'A'), ('b', 'B')]
    """
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="miner-lens-prepare") as pool:

        def begin() -> Future[tuple[Thing, Made]]:
            try:
                item = next(source)
            except Exception as error:
                (failed := Future[Any]()).set_exception(error)
                return failed
            return pool.submit(lambda: (item, prepare(item)))

        following = begin()
        with suppress(StopIteration):
            while True:
                this, following = following, begin()
                yield this.result()


def make_batch(model: Any, items: Sequence[Item]) -> Batch:
    """What the model is given for some samples, or for one prepared pair.

    Raises:
        ValueError: A pair is malformed, or (`SampleError`) a sample cannot be read.
    """
    first = items[0]
    if first.error is not None:
        raise first.error
    device = input_device(model)
    if first.inputs is None:
        inputs, masks = (to_device(p, device) for p in prepared_pair(first.value, first.number))
        rows = len(inputs["input_ids"])
        names = (first.name,) if rows == 1 else (f"{first.name}, row {row}" for row in range(rows))
        places = tuple(first.number + (row << 40) for row in range(rows))
        return Batch(inputs, masks, tuple(names), index=places)
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    apart = [item.inputs for item in items if item.inputs is not None]
    inputs = to_device(collate(apart, tokenizer.pad_token_id or 0), device)
    answers = tuple(item.answer for item in items)
    real = prompt_of(inputs, answers) if any(answers) else inputs.get("attention_mask")
    masks = layout(model).masks(inputs["input_ids"], real)
    values, numbers = tuple(item.value for item in items), tuple(item.number for item in items)
    return Batch(inputs, masks, tuple(item.name for item in items), values, numbers, answers)
