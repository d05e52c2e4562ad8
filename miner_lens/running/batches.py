"""Which samples go through the model together, and what the model is given."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from miner_lens.data.sample import Sample, SampleError
from miner_lens.models.access import layout
from miner_lens.models.generation import Inputs, input_device, render, to_device
from miner_lens.running.batch import Batch

BatchSize = int | Literal["auto"]
Thing = TypeVar("Thing")
Made = TypeVar("Made")

# batch_size="auto" packs so many consecutive samples: enough to find company of the same length,
# few enough to hold opened images of.
WINDOW = 32
# How much of a sample's row may be padding.
PADDING = 0.25
# How many tokens it begins with in a pass, padding included: a device is busy then, and more would
# only take memory.
TOKENS = {"cpu": 2_048, "accelerator": 16_384}


@dataclass(frozen=True)
class Item:
    """One item of the data on its way to the model.

    Attributes:
        number: Its place in the data.
        value: A sample or a prepared pair.
        inputs: A sample's model inputs, on the CPU.
        error: Why it has none.
    """

    number: int
    value: Any
    inputs: Inputs | None = None
    error: SampleError | None = None

    @classmethod
    def prepared(cls, model: Any, number: int, value: Any) -> Item:
        """An item with the inputs that the processor makes of it."""
        if not isinstance(value, Sample):
            return cls(number, value)
        try:
            return cls(number, value, render(model, [value.messages]))
        except SampleError as error:
            named = SampleError(f"{cls(number, value).name}: {error}")
            return cls(number, value, error=named)

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

    Attributes:
        size: Consecutive items in a unit.
        limit: The most tokens in a pass, padding included, where samples of like length are put
            together (a longer sample is a pass by itself); None to put a unit's together.
    """

    def __init__(self, batch_size: BatchSize, device: torch.device) -> None:
        auto = batch_size == "auto"
        self.size = WINDOW if auto else int(batch_size)
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
        taken, rows = 0, {} if first.inputs is None else _rows(first.inputs)
        for item in pending[:most]:
            if item.inputs is None or item.tokens < least or not _fit(rows, _rows(item.inputs)):
                break
            rows |= _rows(item.inputs)
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
    waiting: tuple[Thing, Future[Made]] | None = None
    end: Exception | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="miner-lens-prepare") as pool:
        while end is None:
            upcoming = None
            try:
                item = next(source)
                upcoming = item, pool.submit(prepare, item)
            except Exception as error:
                end = error
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = upcoming
    if not isinstance(end, StopIteration):
        raise end


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory for this pass."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def free_memory() -> None:
    """Give back what a pass that ran out of memory had taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_batch(model: Any, items: Sequence[Item]) -> Batch:
    """What the model is given for some samples, or for one prepared pair.

    Raises:
        SampleError: A sample cannot be read.
        ValueError: A pair is malformed.
    """
    first = items[0]
    if first.error is not None:
        raise first.error
    if first.inputs is None:
        return _from_pair(model, first)
    tokenizer = getattr(model.processor, "tokenizer", model.processor)
    apart = [item.inputs for item in items if item.inputs is not None]
    inputs = to_device(put_together(apart, tokenizer.pad_token_id or 0), input_device(model))
    masks = layout(model).masks(inputs["input_ids"], inputs.get("attention_mask"))
    names, values, numbers = zip(*((i.name, i.value, i.number) for i in items), strict=True)
    return Batch(inputs, masks, names, values, numbers)


def put_together(apart: Sequence[Inputs], pad: int) -> Inputs:
    """One batch of samples that were prepared by themselves, as the processor would make it.

    What there is for each token is padded on the left; what there is for each medium is laid end
    to end.

    Args:
        apart: Model inputs of one sample each, which fit one another.
        pad: The token id to pad with.
    """
    longest = max(inputs["input_ids"].shape[1] for inputs in apart)
    together: Inputs = {}
    for name in dict.fromkeys(name for inputs in apart for name in inputs):
        values = [inputs[name] for inputs in apart if name in inputs]
        if not isinstance(values[0], Tensor):
            together[name] = [one for value in values for one in value]
            continue
        if values[0].shape == apart[0]["input_ids"].shape:
            fill = pad if name == "input_ids" else 0
            values = [
                torch.nn.functional.pad(v, (longest - v.shape[1], 0), value=fill) for v in values
            ]
        together[name] = torch.cat(values)
    return together


def _rows(inputs: Inputs) -> dict[str, tuple[Any, ...]]:
    """By name, what must be alike for two samples' inputs to be put together."""
    shape, rows = inputs["input_ids"].shape, {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            rows[name] = ("pos",) if value.shape == shape else (value.dtype, *value.shape[1:])
        else:
            rows[name] = (type(value),)
    return rows


def _fit(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether what there is for each token is the same, and the rest of one kind where in both."""
    return all(
        one[name] == two[name] if name in one and name in two else row != ("pos",)
        for name, row in (one | two).items()
    )


def _from_pair(model: Any, item: Item) -> Batch:
    pair, number = item.value, item.number
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise ValueError(
            "Data must be Samples or pairs (model_inputs, masks); item "
            f"{number} is {type(pair).__name__}."
        )
    inputs, masks = (to_device(dict(part), input_device(model)) for part in pair)
    if "input" in inputs:
        inputs["input_ids"] = inputs.pop("input")
    if "input_ids" not in inputs:
        raise ValueError(f"Item {number}: the model inputs have no input_ids.")
    if not masks:
        raise ValueError(f"Item {number}: masks must name at least one modality.")
    shape = inputs["input_ids"].shape
    one = f"sample {number}"
    names = (one,) if shape[0] == 1 else tuple(f"{one}, row {row}" for row in range(shape[0]))
    batch = Batch(inputs, masks, names, index=(number,) * shape[0])
    for modality, mask in masks.items():
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"Item {number}: the mask of {modality!r} must be a boolean tensor of shape "
                f"{tuple(shape)} like input_ids, not {mask.dtype} of shape {tuple(mask.shape)}."
            )
        if bool((mask & ~batch.real).any()):
            raise ValueError(f"Item {number}: the mask of {modality!r} marks padding as well.")
    return batch
