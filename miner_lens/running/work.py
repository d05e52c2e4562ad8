"""What a run of any kind does: each process works through its share of the data."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from miner_lens.data.items import item_of
from miner_lens.data.signature import item_signature
from miner_lens.installed import versions
from miner_lens.models.access import identity
from miner_lens.models.foreign import foreign_hooks
from miner_lens.models.generation import input_device
from miner_lens.models.inside import hf_model_of
from miner_lens.neurons.active import active
from miner_lens.running.checkpoint import NAME, Checkpoint
from miner_lens.running.distributed import Ranks
from miner_lens.running.passes import Sampler
from miner_lens.running.stateful import Mergeable, Together

Unit = TypeVar("Unit")
Prepared = TypeVar("Prepared")

SPOT_CHECKS = 1_000  # about so many of the items that are done are looked up again and compared

OTHER_DATA = (
    "The checkpoint was written over other data: now {what}. Give the same data in the same order, "
    "or another folder."
)


class Items:
    """The items of the data by number: looked up where they can be, walked along otherwise."""

    def __init__(self, data: Any, limit: int | None = None) -> None:
        self.indexed = (
            hasattr(data, "__len__")
            and hasattr(data, "__getitem__")
            and not isinstance(data, Mapping | IterableDataset)
        )
        lengths = [len(data)] if hasattr(data, "__len__") else []
        self.length = min([*lengths, *([] if limit is None else [limit])], default=None)
        self._data, self._limit = data, limit

    def __iter__(self) -> Iterator[tuple[int, Callable[[], Any]]]:
        """The number of each item, with what looks it up."""
        if self.indexed:
            return ((number, partial(self.look_up, number)) for number in range(self.length or 0))
        return enumerate(partial(item_of, item) for item in islice(self._data, self._limit))

    def look_up(self, number: int) -> Any:
        """An item of data that can be indexed."""
        return item_of(self._data[number])


def shard(
    items: Items, size: int, ranks: Ranks, done: Mapping[int, int]
) -> Iterator[dict[int, Any]]:
    """One rank's units of the data, unit u being rank u modulo world_size's: what is to be done.

    So what goes through the model together depends on the data and the unit's size alone, never on
    how many ranks there are. What is done, whoever has done it, is given by number and signature;
    it is passed over, and some of it compared with the data.

    Yields:
        The items of a unit that are not done, by number.

    Raises:
        ValueError: What is done was done with other data.
    """
    step, passed, walk = max(1, len(done) // SPOT_CHECKS), 0, iter(items)
    for unit, numbered in enumerate(iter(lambda: dict(islice(walk, size)), {})):
        for number in numbered.keys() & done.keys():
            look_up = numbered.pop(number)
            if number % step == 0 and item_signature(look_up()) != done[number]:
                raise ValueError(OTHER_DATA.format(what=f"item {number} is another"))
            passed += 1
        if numbered and unit % ranks.world_size == ranks.rank:
            yield {number: look_up() for number, look_up in numbered.items()}
    if passed < len(done):
        raise ValueError(OTHER_DATA.format(what=f"it has only {passed} of the items"))


def ahead(
    units: Iterable[Unit], prepare: Callable[[Unit], Prepared]
) -> Generator[tuple[Unit, Prepared], None, None]:
    """Each unit with what `prepare` makes of it, made while the unit before it is being used.

    Units are taken by the caller's thread, one ahead; `prepare` runs in a thread of its own, and
    what it raises is raised when the unit's turn comes.

    Example:
        >>> list(ahead("ab", str.upper))
        [('a', 'A'), ('b', 'B')]
    """
    with ThreadPoolExecutor(1, thread_name_prefix="miner-lens-prepare") as pool:
        begun = ((unit, pool.submit(prepare, unit)) for unit in units)
        for this, _following in pairwise(chain(begun, [None])):
            if this is not None:
                yield this[0], this[1].result()


def work_through(
    ranks: Ranks,
    model: Any,
    items: Items,
    states: Sequence[Mergeable],
    sampler: Sampler,
    *,
    prepare: Callable[[dict[int, Any]], Prepared],
    work: Callable[[Prepared], int],
    settings: dict[str, Any],
    checkpoint: str | Path | None,
    seconds: float,
    samples: int | None = None,
    progress: bool = True,
) -> tuple[int, int]:
    """Work through the data, a unit of `sampler.size` items at a time, and merge the states.

    Afterwards every rank has the states of all. What goes through the model together depends on
    the data and the size of a unit, not on the ranks or on where a run was stopped.

    Args:
        ranks: The processes of this run.
        model: What the items are shown to.
        items: The data.
        states: What `work` adds to; new ones, if there are several ranks or a checkpoint.
        sampler: Knows how many items are a unit.
        prepare: What can be done for a unit while the one before it is at work, in a thread.
        work: Do a prepared unit, whole; how many of its items could not be used.
        settings: What else than the model's state must be the same on all ranks, and when the run
            is continued, as JSON can hold it.
        checkpoint: A folder to keep what is done in, every so many `seconds` or own `samples`.
        progress: Whether to show a progress bar.

    Returns:
        How many items were seen, and how many of these could not be used.

    Raises:
        ValueError: A checkpoint of another run or one that another run is using, or ranks that
            differ in data or settings.
        RankError: Another process has stopped.
    """
    path = None
    if checkpoint is not None:
        path = Path(checkpoint) / NAME.format(rank=ranks.rank, world_size=ranks.world_size)
    if checkpoint is not None or ranks.world_size > 1:
        settings = json.loads(json.dumps(_state_of(model, checkpoint is not None) | settings))
    if ranks.world_size > 1:
        _require_same(ranks, settings, items)
    state = Together(states)
    kept = Checkpoint(path, state, settings, seconds, samples)
    with kept.reserved() if ranks.rank == 0 else nullcontext():
        pairs, limit = ranks.gather([list(kept.done.items()), kept.limit])[0]
        sampler.limit = limit or sampler.limit
        done, last = dict(pairs), max((number for number, _ in pairs), default=-1)
        # As units are dealt in turn, the other ranks are where rank 0 is, but for a unit.
        hidden = not progress or ranks.rank > 0
        bar = tqdm(total=items.length, initial=len(done), unit=" samples", disable=hidden)
        with bar, closing(ahead(shard(items, sampler.size, ranks, done), prepare)) as units:
            for unit, prepared in units:
                kept.add(unit, work(prepared), sampler.limit)
                if max(unit) > last:  # all that is done has been compared with these data
                    kept.write()
                if kept.skipped:
                    bar.set_postfix(skipped=kept.skipped, refresh=False)
                bar.update(max(unit) + 1 - bar.n)
            kept.write(finished=True)
            ranks.merge(state)
            seen, skipped = map(sum, zip(*ranks.gather([kept.seen, kept.skipped]), strict=True))
            bar.update(seen - bar.n)
    return seen, skipped


def _state_of(model: Any, fully: bool) -> dict[str, Any]:
    """What must be the same of a model when a run is continued."""
    hf_model = hf_model_of(model)
    device = input_device(model).type
    lower = torch.is_autocast_enabled(device) if torch.amp.is_autocast_available(device) else False
    return {
        "model": identity(model).to_dict(),
        "dtype": str(hf_model.dtype),
        "autocast": str(torch.get_autocast_dtype(device)) if lower else None,
        "ablations": active(hf_model),
        "hooks": foreign_hooks(model, fully),
        "versions": versions(),
    }


def _require_same(ranks: Ranks, settings: dict[str, Any], items: Items) -> None:
    """Refuse ranks that would not work on the same thing."""
    few = sorted({0, items.length // 2, items.length - 1}) if items.indexed and items.length else []
    some = [item_signature(items.look_up(number)) for number in few]
    told = ranks.gather({"settings": settings, "samples": items.length, "some samples": some})
    for rank, theirs in enumerate(told):
        for what, value in theirs.items():
            if value != told[0][what]:
                raise ValueError(
                    f"Ranks 0 and {rank} differ in {what}: {told[0][what]} and {value}. Give all "
                    "processes the same model, settings, and data in the same order."
                )
