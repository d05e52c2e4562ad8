"""One pass over the data, with any number of analyzers reading along."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from miner_lens.data.sample import Sample
from miner_lens.models.generation import Inputs
from miner_lens.models.loading import identity, is_bridge, prepare
from miner_lens.models.modality import Masks
from miner_lens.running.batches import Batch, BatchSize, batching
from miner_lens.running.checkpoint import Checkpoint, Past
from miner_lens.running.distributed import Ranks, absorb, joined
from miner_lens.running.progress import Bar
from miner_lens.running.protocol import Analyzer, CountsSkipped, Hook, KnowsModel, State
from miner_lens.running.shares import Items, Share
from miner_lens.running.work import OnError, Work, evaluating

__all__ = [
    "Analyzer",
    "Batch",
    "BatchSize",
    "CountsSkipped",
    "Data",
    "Hook",
    "KnowsModel",
    "OnError",
    "State",
    "run",
]

Prepared = tuple[Inputs, Masks]
Data = Iterable[Sample] | Iterable[Prepared]


def run(
    model: Any,
    data: Data,
    *analyzers: Analyzer[Any],
    batch_size: BatchSize = 1,
    limit: int | None = None,
    on_error: OnError = "raise",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    checkpoint_every_samples: int | None = None,
) -> Any:
    """Show every sample to the model once, prefill only, with all analyzers reading along.

    Nothing is kept from sample to sample but the analyzers' states. Samples are prepared while the
    model is busy with those before them, so an iterable is read one batch ahead. Under torchrun,
    accelerate or srun each process takes a share of the data, and rank 0 gets the result; see
    docs/scaling.md.

    Args:
        model: A `TransformerBridge`.
        data: Samples, or prepared pairs `(model_inputs, masks)` with
            `masks: {modality: Bool[batch pos]}`.
        analyzers: At least one; they share each forward pass. With several processes or a
            checkpoint they must be new.
        batch_size: Samples in one forward pass. Changes speed, not results. `"auto"` puts samples
            of like length together, up to a number of tokens that is halved when memory runs out.
            Prepared pairs are passed on as they are.
        limit: Stop after this many samples (or pairs).
        on_error: What to do with a sample that cannot be read or gives NaN or infinite
            activations: raise `SampleError`, or skip and count it.
        progress: Whether to show a progress bar with samples per second.
        checkpoint: A folder in which to keep the analyzers' states. Called again with the same
            model, data and settings, a run that was stopped, also by SIGKILL, continues from the
            last write; its result is the one of an uninterrupted run, bit for bit. The number of
            processes may change (then equal to 1e-6); they must share the folder, and no other run
            may use it meanwhile.
        checkpoint_every: Seconds between two writes.
        checkpoint_every_samples: Write also after so many samples of a process.

    Returns:
        The analyzer's result, or a tuple of results where there are several; None on other ranks
        than 0.

    Raises:
        ValueError: No data, no usable sample, no analyzer, not a bridge, a checkpoint of
            another run or one that another run is using, or processes that differ in model, data
            or settings.
        SampleError: A sample is unusable and `on_error="raise"`.
        RankError: Another process has stopped.
    """
    _check_arguments(model, analyzers, batch_size, on_error)
    prepare(model)
    for analyzer in analyzers:
        if isinstance(analyzer, KnowsModel):
            analyzer.begin(model)
    way = batching(batch_size, model)
    items = Items(data, limit)
    keeper = None
    with joined(_advice(checkpoint)) as ranks, ExitStack() as stack:
        past = Past.none(ranks.world)
        settings = partial(_settings, model, analyzers, batch_size, on_error)
        if ranks.world > 1:
            _require_same(ranks, settings(), items)
        if checkpoint is not None:
            keeper = Checkpoint(checkpoint, checkpoint_every, checkpoint_every_samples, settings())
            if ranks.rank == 0:
                stack.enter_context(keeper.reserved())
            found = keeper.past(ranks.world).to_dict() if ranks.rank == 0 else None
            past = Past.from_dict(ranks.share(found))
        record = past.record(ranks.rank)
        if keeper is not None and past.names[ranks.rank]:
            keeper.restore(past.names[ranks.rank], record, analyzers)
        way.limit = record.limit if record.limit is not None else way.limit
        share = Share(items, way.size, past.legs, ranks.rank, (past.items, past.digest))
        with evaluating(model), Bar(progress and ranks.rank == 0, items.length) as bar:
            work = Work(model, analyzers, on_error, way, ranks, keeper, past, record, bar)
            seen, skipped = work.run(share)
        if seen == 0:
            raise ValueError("There is no data: the iterable of samples is empty.")
        if skipped == seen:
            raise ValueError(f"None of the {seen} samples could be used; all were skipped.")
        ranks.merge(analyzers, model, record.items > 0)
        if ranks.rank > 0:
            return None
        holding = seen > past.items or any(past.names)
        for states in keeper.earlier(past, len(analyzers)) if keeper is not None else ():
            for analyzer, state in zip(analyzers, states, strict=True):
                absorb(analyzer, state, model, holding)
            holding = True
        results = tuple(analyzer.result() for analyzer in analyzers)
    return results[0] if len(results) == 1 else results


def _settings(
    model: Any, analyzers: tuple[Any, ...], batch_size: BatchSize, on_error: str
) -> dict[str, Any]:
    """What must be the same when a run is continued."""
    kinds = [[type(one).__name__, getattr(one, "settings", {})] for one in analyzers]
    who = identity(model).to_dict()
    settings = {"model": who, "analyzers": kinds, "batch_size": batch_size, "on_error": on_error}
    as_read: dict[str, Any] = json.loads(json.dumps(settings))
    return as_read


def _advice(checkpoint: str | Path | None) -> str:
    """What an error says about going on."""
    if checkpoint is None:
        return "Nothing was kept: with checkpoint='folder' the next run would continue."
    return f"Start it again to continue from {checkpoint}, with any number of processes."


def _require_same(ranks: Ranks, settings: dict[str, Any], items: Items) -> None:
    """Refuse ranks that would not work on the same thing."""
    mine = {"settings": settings, "samples": items.length, "some samples": items.probe()}
    for rank, theirs in enumerate(ranks.gather(mine)):
        for what, value in theirs.items():
            if value != mine[what]:
                raise ValueError(
                    f"Ranks {ranks.rank} and {rank} differ in {what}: {mine[what]} and {value}. "
                    "Give all processes the same model, the same data in the same order, and the "
                    "same settings."
                )


def _check_arguments(
    model: Any, analyzers: tuple[Any, ...], batch_size: BatchSize, on_error: str
) -> None:
    if not is_bridge(model):
        raise ValueError(
            f"run needs a TransformerBridge, got {type(model).__name__}: use ml.wrap(model)."
        )
    if not analyzers:
        raise ValueError("run needs at least one analyzer, such as ml.ImportanceAnalyzer().")
    if len({id(analyzer) for analyzer in analyzers}) < len(analyzers):
        raise ValueError("An analyzer was given twice; each keeps its own state.")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be at least 1, or 'auto', not {batch_size!r}.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}.")
