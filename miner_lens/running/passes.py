"""The passes of a run: one rank's shard of the data through the model, and what may go wrong."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from miner_lens.data.sample import SampleError
from miner_lens.models import attention
from miner_lens.models.bridge import hf_model_of
from miner_lens.models.generation import Inputs
from miner_lens.running.analyzer import Analyzer, pass_hooks
from miner_lens.running.batch import Batch
from miner_lens.running.batches import (
    Arranged,
    BatchesByLength,
    FixedBatches,
    Item,
    ahead,
    free_memory,
    is_out_of_memory,
    make_batch,
)
from miner_lens.running.checkpoint import Checkpoint, Record
from miner_lens.running.distributed import RankError, Ranks
from miner_lens.running.progress import Bar
from miner_lens.running.shards import OtherDataError, Shard, Unit

OnError = Literal["raise", "skip"]


@dataclass
class Passes:
    """One rank's passes over its shard of the data.

    Attributes:
        model: A `TransformerBridge`.
        analyzers: They read along.
        on_error: What to do with a sample that cannot be used.
        batches: How samples are put together.
        ranks: All processes of the run.
        checkpoint: Where states are written, if they are.
        before: What all ranks had done before.
        record: What this rank has done, before and now.
        bar: Shows how far all are.
    """

    model: Any
    analyzers: tuple[Analyzer[Any], ...]
    on_error: OnError
    batches: FixedBatches | BatchesByLength
    ranks: Ranks
    checkpoint: Checkpoint | None
    before: Record
    record: Record
    bar: Bar

    def __post_init__(self) -> None:
        self._items = self._skipped = 0

    def run(self, shard: Shard) -> tuple[int, int]:
        """Run what is left; how many samples all ranks have seen and skipped in all."""
        self._show()
        try:
            with closing(ahead(shard, self._arrange)) as units:
                for unit, arranged in units:
                    self._run_unit(unit, arranged)
                    self._write(shard)
                    self._show()
        except OtherDataError as error:
            assert self.checkpoint is not None
            raise ValueError(
                f"{self.checkpoint.folder} was written over other data: {error} Give the same data "
                "in the same order, or another folder."
            ) from error
        except RankError:
            self._write(shard, finished=True)
            raise
        self._write(shard, finished=True)
        told = self.ranks.gather([self._items, self._skipped], self._show)
        seen = len(self.before.covered) + sum(items for items, _ in told)
        skipped = self.before.skipped + sum(skipped for _, skipped in told)
        self.bar.show(seen, skipped)
        return seen, skipped

    def _arrange(self, unit: Unit) -> Arranged:
        """What can be done for a unit while the model is busy with the one before."""
        items = [Item(index, value) for index, value in unit.items.items()]
        return self.batches.arrange(self.model, items)

    def _run_unit(self, unit: Unit, arranged: Arranged) -> None:
        skipped = sum(self.passes(arranged))
        self.record.add(unit.items, skipped)
        self.record.limit = self.batches.limit
        self._items += len(unit.items)
        self._skipped += skipped

    def _write(self, shard: Shard, finished: bool = False) -> None:
        # What is begun again over other data must not be written before that is found out.
        due = self.checkpoint is not None and self.checkpoint.is_due(self.record, finished)
        if self.checkpoint is not None and due and shard.checked:
            self.checkpoint.write(self.record, self.analyzers)

    def _show(self) -> None:
        items, skipped = self.ranks.progress(self._items, self._skipped)
        self.bar.show(len(self.before.covered) + items, self.before.skipped + skipped)

    def passes(self, arranged: Arranged) -> Iterator[int]:
        """Run some samples, as many at a time as fit.

        Yields:
            How many of those that went together were skipped.
        """
        pending = arranged.pending
        while pending:
            group = pending[: self.batches.take(pending)]
            failures = self._attempt(group, arranged.ready)
            if failures is None:
                # Not within the handler, where the error would still hold what the pass had taken.
                free_memory()
                continue
            for analyzer in self.analyzers if failures else ():
                analyzer.skip(failures)
            pending = pending[len(group) :]
            yield failures

    def _attempt(
        self, group: list[Item], ready: dict[tuple[int, ...], Inputs] | None = None
    ) -> int | None:
        """Run a group, or its samples one by one where that fails and may.

        Returns:
            How many were skipped; None if memory ran out and less is to be tried.
        """
        try:
            batch = self._read(group, ready)
        except SampleError:
            if self.on_error == "raise":
                raise
            # One by one, and all before the next write, so that a run that is continued does alike.
            return 1 if len(group) == 1 else sum(self._attempt([one]) or 0 for one in group)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.batches.lower(group):
                return None
            names = ", ".join(item.name for item in group)
            error.add_note(f"Memory ran out in a pass over {names}.")
            raise
        for analyzer in self.analyzers:
            analyzer.accept(batch)
        return 0

    def _read(self, group: list[Item], ready: dict[tuple[int, ...], Inputs] | None) -> Batch:
        batch = make_batch(self.model, group, ready)
        _forward(self.model, batch, self.analyzers)
        for analyzer in self.analyzers:
            analyzer.check(batch)
        return batch


def _forward(model: Any, batch: Batch, analyzers: tuple[Analyzer[Any], ...]) -> None:
    hf_model = hf_model_of(model)
    for analyzer in analyzers:
        analyzer.open(batch, hf_model)
    hooks = pass_hooks(analyzers, model, lambda: batch)
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=hooks), _one_logit(hf_model) as options:
            hf_model(**batch.inputs, use_cache=False, **options)
    except SampleError:
        raise
    except ValueError as error:
        # Such as fewer placeholders than the media have tokens.
        raise SampleError(f"{', '.join(batch.ids)}: the model refuses it: {error}") from error


@contextmanager
def _one_logit(hf_model: Any) -> Iterator[Inputs]:
    """No projection onto the vocabulary but of the last position.

    Yields:
        What to tell the model; one that cannot be told so has its head see no more.
    """
    if "logits_to_keep" in inspect.signature(hf_model.forward).parameters:
        yield {"logits_to_keep": 1}
        return
    head = hf_model.get_output_embeddings()
    if head is None:
        yield {}
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, -1:], *args[1:]))
    try:
        yield {}
    finally:
        handle.remove()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout, and fused attention; the model's own settings come back afterwards."""
    hf_model = hf_model_of(model)
    training = [module for module in hf_model.modules() if module.training]
    hf_model.eval()
    try:
        with attention.fused(attention.attentions_of(model)):
            yield
    finally:
        for module in training:
            module.training = True
