"""Which samples go through the model together, and what the model is given."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from miner_lens.data.sample import Sample, SampleError
from miner_lens.running.batch import Batch
from miner_lens.models.generation import Inputs, input_device, render, to_device
from miner_lens.models.access import layout

BatchSize = int | Literal["auto"]
Thing = TypeVar("Thing")
Made = TypeVar("Made")

# Batches by length are packed from so many consecutive samples: enough to find company of the same
# length, few enough to hold opened images of.
WINDOW = 32
# How much of a sample's row may be padding.
PADDING = 0.25
# Where packing by length starts: with so many tokens in a pass, padding included, a device is
# busy, and more would only take memory.
TOKENS = {"cpu": 2_048, "accelerator": 16_384}


@dataclass(frozen=True)
class Item:
    """One item of the data on its way to the model.

    Attributes:
        index: Its place in the data.
        value: A sample or a prepared pair.
        inputs: The sample's own model inputs, on the CPU, where batches are made by length.
    """

    index: int
    value: Any
    inputs: Inputs | None = None

    @property
    def name(self) -> str:
        """What error messages call it."""
        return getattr(self.value, "id", None) or f"sample {self.index}"

    @property
    def tokens(self) -> int:
        """How many there are, as far as is known."""
        return 0 if self.inputs is None else int(self.inputs["input_ids"].shape[1])

    @property
    def kind(self) -> str:
        """Samples of one kind have inputs that can be put together without the processor."""
        if self.inputs is None:
            return ""
        ids = self.inputs["input_ids"]
        return repr(sorted((name, _row(value, ids)) for name, value in self.inputs.items()))


@dataclass
class Arranged:
    """Entries in the order in which they will be run, with what was prepared of them.

    Attributes:
        pending: The items.
        ready: Inputs, on the CPU, of those that go together, by their places in the data.
    """

    pending: list[Item]
    ready: dict[tuple[int, ...], Inputs] = field(default_factory=dict)


class FixedBatches:
    """So many consecutive samples in a pass; a prepared pair is a pass by itself."""

    limit: int | None = None

    def __init__(self, size: int) -> None:
        self.size = size

    def arrange(self, model: Any, items: Sequence[Item]) -> Arranged:
        """Prepare those together that will be run together."""
        arranged = Arranged(list(items))
        left = arranged.pending
        while left:
            group = left[: self.take(left)]
            left = left[len(group) :]
            if isinstance(group[0].value, Sample):
                # One that fails is tried again when its turn comes, and raised or skipped there.
                with suppress(SampleError):
                    arranged.ready[_places(group)] = _render(model, group)
        return arranged

    def take(self, pending: Sequence[Item]) -> int:
        """How many of the next items go into one pass."""
        samples = 0
        while samples < min(self.size, len(pending)) and isinstance(pending[samples].value, Sample):
            samples += 1
        return samples or 1

    def lower(self, group: Sequence[Item]) -> bool:
        """Take less after memory ran out; whether that can be done."""
        return False


class BatchesByLength:
    """As many samples of a window in a pass as a number of tokens allows, longest first.

    What goes together depends on the samples and the limit alone, never on what was run before, so
    a run that was stopped goes on with the same passes. The limit is kept in checkpoints.

    Args:
        limit: Tokens in a pass, padding included. A longer sample is a pass by itself.
    """

    size = WINDOW

    def __init__(self, limit: int) -> None:
        self.limit: int | None = limit

    def arrange(self, model: Any, items: Sequence[Item]) -> Arranged:
        """Prepare each sample by itself, and put those of a kind and of a length side by side."""
        prepared = [self._prepare(model, item) for item in items]
        prepared.sort(key=lambda item: (item.kind, -item.tokens, item.index))
        return Arranged(prepared)

    def _prepare(self, model: Any, item: Item) -> Item:
        if not isinstance(item.value, Sample):
            return item
        try:
            return Item(item.index, item.value, _render(model, [item]))
        except SampleError:
            # It is tried again by itself, where the error is raised or the sample skipped.
            return item

    def take(self, pending: Sequence[Item]) -> int:
        """How many of the next items go into one pass."""
        assert self.limit is not None
        first = pending[0]
        if first.inputs is None:
            return 1
        alike, least = 1, (1 - PADDING) * first.tokens
        while (
            alike < len(pending)
            and pending[alike].kind == first.kind
            and pending[alike].tokens >= least
        ):
            alike += 1
        return min(alike, max(1, self.limit // first.tokens))

    def lower(self, group: Sequence[Item]) -> bool:
        """Halve the limit after memory ran out; whether that can be done."""
        if len(group) == 1:
            return False
        # Memory that is short for a few samples is short whatever the limit was.
        self.limit = len(group) // 2 * group[0].tokens
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


def batching(batch_size: BatchSize, model: Any) -> FixedBatches | BatchesByLength:
    """The way of making batches that `run(batch_size=...)` asks for."""
    if batch_size == "auto":
        on_cpu = input_device(model).type == "cpu"
        return BatchesByLength(TOKENS["cpu" if on_cpu else "accelerator"])
    return FixedBatches(batch_size)


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


def make_batch(
    model: Any, group: Sequence[Item], ready: dict[tuple[int, ...], Inputs] | None = None
) -> Batch:
    """What the model is given for some samples, or for one prepared pair.

    Args:
        model: A bridge with a processor.
        group: Samples, or one pair.
        ready: Inputs that were prepared before, by the samples' places; used up.

    Raises:
        SampleError: A sample cannot be read.
        ValueError: A pair is malformed.
    """
    first = group[0]
    if not isinstance(first.value, Sample):
        return _prepared(model, first)
    ids = tuple(item.name for item in group)
    apart = [item.inputs for item in group if item.inputs is not None]
    if len(apart) == len(group):
        tokenizer = getattr(model.processor, "tokenizer", model.processor)
        inputs = put_together(apart, tokenizer.pad_token_id or 0)
    else:
        known = {} if ready is None else ready
        places = _places(group)
        inputs = known.pop(places) if places in known else _render(model, group)
    inputs = to_device(inputs, input_device(model))
    masks = layout(model).masks(inputs["input_ids"], inputs.get("attention_mask"))
    samples = tuple(item.value for item in group)
    return Batch(inputs, masks, ids, samples, _places(group))


def _places(group: Sequence[Item]) -> tuple[int, ...]:
    return tuple(item.index for item in group)


def _render(model: Any, group: Sequence[Item]) -> Inputs:
    try:
        return render(model, [item.value.messages for item in group])
    except SampleError as error:
        names = ", ".join(item.name for item in group)
        raise SampleError(f"{names}: {error}") from error


def put_together(apart: Sequence[Inputs], pad: int) -> Inputs:
    """One batch of samples that were prepared by themselves, as the processor would make it.

    What there is for each token is padded on the left; what there is for each medium is laid end
    to end.

    Args:
        apart: Model inputs of one sample each, all of one kind.
        pad: The token id to pad with.
    """
    longest = max(inputs["input_ids"].shape[1] for inputs in apart)
    together: Inputs = {}
    for name, first in apart[0].items():
        values = [inputs[name] for inputs in apart]
        if not isinstance(first, Tensor):
            together[name] = [one for value in values for one in value]
            continue
        if _per_token(first, apart[0]["input_ids"]):
            fill = pad if name == "input_ids" else 0
            values = [
                torch.nn.functional.pad(v, (longest - v.shape[1], 0), value=fill) for v in values
            ]
        together[name] = torch.cat(values)
    return together


def _per_token(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape


def _row(value: Any, ids: Tensor) -> tuple[Any, ...]:
    """What must be alike for two inputs of one name to be put together."""
    if not isinstance(value, Tensor):
        return (type(value).__name__,)
    return (str(value.dtype), *(("pos",) if _per_token(value, ids) else value.shape[1:]))


def _prepared(model: Any, item: Item) -> Batch:
    pair, index = item.value, item.index
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise ValueError(
            "Data must be Samples or pairs (model_inputs, masks); item "
            f"{index} is {type(pair).__name__}."
        )
    device = input_device(model)
    inputs = to_device(dict(pair[0]), device)
    if "input" in inputs:
        inputs["input_ids"] = inputs.pop("input")
    masks = to_device(dict(pair[1]), device)
    if "input_ids" not in inputs:
        raise ValueError(f"Item {index}: the model inputs have no input_ids.")
    shape = inputs["input_ids"].shape
    for modality, mask in masks.items():
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"Item {index}: the mask of {modality!r} must be a boolean tensor of shape "
                f"{tuple(shape)} like input_ids, not {mask.dtype} of shape {tuple(mask.shape)}."
            )
    if not masks:
        raise ValueError(f"Item {index}: masks must name at least one modality.")
    rows = range(shape[0])
    one = (f"sample {index}",)
    names: Iterable[str] = one if len(rows) == 1 else (f"sample {index}, row {r}" for r in rows)
    batch = Batch(inputs, masks, tuple(names), index=(index,) * len(rows))
    for modality, mask in masks.items():
        if bool((mask & ~batch.real).any()):
            raise ValueError(f"Item {index}: the mask of {modality!r} marks padding as well.")
    return batch
