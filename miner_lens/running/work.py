"""What a run of any kind does: each process works through its share of the data."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from miner_lens.data.signature import signature
from miner_lens.models.access import identity
from miner_lens.models.inside import hf_model_of
from miner_lens.neurons.active import active
from miner_lens.running.batches import Sampler, ahead
from miner_lens.running.checkpoint import Checkpoint, Record
from miner_lens.running.distributed import RankError, Ranks
from miner_lens.running.shards import Items, Shard
from miner_lens.running.stateful import Mergeable

Prepared = TypeVar("Prepared")


def state_of(model: Any) -> dict[str, Any]:
    """What must be the same of a model when a run is continued, as JSON has it."""
    hf_model = hf_model_of(model)
    found = {
        "model": identity(model).to_dict(),
        "dtype": str(hf_model.dtype),
        "ablations": active(hf_model),
        "hooks": [name for name, point in model.hook_dict.items() if point.fwd_hooks],
    }
    return dict(json.loads(json.dumps(found)))


def work_through(
    ranks: Ranks,
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
        items: The data.
        states: New ones, which `work` adds to.
        sampler: Knows how many items are a unit.
        prepare: What can be done for a unit while the one before it is at work, in a thread.
        work: Do a prepared unit, whole; how many of its items could not be used.
        settings: What must be the same on all ranks, and when the run is continued. Its `analyzers`
            has an entry for each state.
        checkpoint: A folder in which what is done is kept.
        seconds: Between two writes.
        samples: Write also after so many samples of a process.
        progress: Whether to show a progress bar.

    Returns:
        How many items were seen, and how many of these could not be used.

    Raises:
        ValueError: A checkpoint of another run or one that another run is using, or ranks that
            differ in data or settings.
        RankError: Another process has stopped.
    """
    _require_same(ranks, settings, items)
    kept, record, done = None, Record(), dict[int, int]()
    with ExitStack() as stack:
        if checkpoint is not None:
            kept = Checkpoint(Path(checkpoint), ranks, settings, seconds, samples)
            if ranks.rank == 0:
                stack.enter_context(kept.reserved())
            covered = kept.survey() if ranks.rank == 0 else {}
            pairs = ranks.gather({name: list(one.items()) for name, one in covered.items()})[0]
            covered = {name: dict(some) for name, some in pairs.items()}
            record, done = kept.load(covered, states), dict(ChainMap(*covered.values()))
        sampler.limit = record.limit or sampler.limit
        shard = Shard(items, sampler.size, ranks, done)
        shown = progress and ranks.rank == 0
        bar = tqdm(total=items.length, initial=len(done), unit=" samples", disable=not shown)
        stack.enter_context(bar)

        def show() -> tuple[int, int]:
            seen, skipped = ranks.progress(record.seen, record.skipped)
            if skipped:
                bar.set_postfix(skipped=skipped, refresh=False)
            bar.update(seen - bar.n)
            return seen, skipped

        def write(finished: bool = False) -> None:
            # What is continued with other data must not be written before that is found out.
            if kept is not None and kept.is_due(record, finished) and shard.checked:
                kept.write(record, states)

        try:
            show()
            with closing(ahead(shard, prepare)) as units:
                for unit, prepared in units:
                    record.add(unit, work(prepared), kept is not None)
                    record.limit = sampler.limit
                    write()
                    show()
        except RankError:
            write(finished=True)
            raise
        write(finished=True)
        ranks.wait(show)
        counts = show()
        ranks.merge(states)
    return counts


def _require_same(ranks: Ranks, settings: dict[str, Any], items: Items) -> None:
    """Refuse ranks that would not work on the same thing."""
    if ranks.world_size == 1:
        return
    few = sorted({0, (items.length or 1) // 2, (items.length or 1) - 1})
    some = [signature(items.look_up(one)) for one in few if items.indexed and items.length]
    mine = {"settings": settings, "samples": items.length, "some samples": some}
    for rank, theirs in enumerate(ranks.gather(mine)):
        for what in mine:
            if theirs[what] != mine[what]:
                values = f"{mine[what]} and {theirs[what]}"
                raise ValueError(
                    f"Ranks {ranks.rank} and {rank} differ in {what}: {values}. Give all processes "
                    "the same model, settings, and data in the same order."
                )
