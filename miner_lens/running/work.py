"""The passes of a run: one rank's share of the data through the model, and what may go wrong."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from miner_lens.data.sample import SampleError
from miner_lens.models import attention
from miner_lens.models.generation import Inputs
from miner_lens.models.loading import hf_model_of
from miner_lens.running.batches import (
    Arranged,
    Batch,
    ByLength,
    Entry,
    FixedSize,
    ahead,
    free_memory,
    is_out_of_memory,
    make_batch,
)
from miner_lens.running.checkpoint import Checkpoint, Past, Record
from miner_lens.running.distributed import RankError, Ranks
from miner_lens.running.progress import Bar
from miner_lens.running.protocol import Analyzer, CountsSkipped
from miner_lens.running.shares import OtherDataError, Share, Unit

OnError = Literal["raise", "skip"]


@dataclass
class Work:
    """One rank's passes over its share of the data.

    Attributes:
        model: A `TransformerBridge`.
        analyzers: They read along.
        on_error: What to do with a sample that cannot be used.
        way: How samples are put together.
        ranks: All processes of the run.
        keeper: Where checkpoints are written, if they are.
        past: What all ranks had done before.
        record: What this rank has done in this leg.
        bar: Shows how far all are.
    """

    model: Any
    analyzers: tuple[Analyzer[Any], ...]
    on_error: OnError
    way: FixedSize | ByLength
    ranks: Ranks
    keeper: Checkpoint | None
    past: Past
    record: Record
    bar: Bar

    def __post_init__(self) -> None:
        self._restored = (self.record.items, self.record.skipped)

    def run(self, share: Share) -> tuple[int, int]:
        """Run what is left; how many samples all ranks have seen and skipped in all."""
        record = self.record
        self._show()
        try:
            with closing(ahead(share, self._arrange)) as units:
                for unit, arranged in units:
                    self._run_unit(unit, arranged, share)
        except OtherDataError as error:
            assert self.keeper is not None
            raise ValueError(
                f"{self.keeper.folder} was written over other data: {error} Give the same data in "
                "the same order, or another folder."
            ) from error
        except RankError:
            if self.keeper and share.checked and self.keeper.is_due(record, finished=True):
                self.keeper.write(record, self.analyzers)
            raise
        if self.keeper is not None and self.keeper.is_due(record, finished=True):
            self.keeper.write(record, self.analyzers)
        fresh = [record.items - self._restored[0], record.skipped - self._restored[1]]
        all_fresh = self.ranks.gather(fresh, self._show)
        seen = self.past.items + sum(items for items, _ in all_fresh)
        skipped = self.past.skipped + sum(skipped for _, skipped in all_fresh)
        self.bar.show(seen, skipped)
        return seen, skipped

    def _arrange(self, unit: Unit) -> Arranged:
        """What can be done for a unit while the model is busy with the one before."""
        entries = [Entry(index, item) for index, item in unit.items.items()]
        return self.way.arrange(self.model, entries)

    def _run_unit(self, unit: Unit, arranged: Arranged, share: Share) -> None:
        record = self.record
        if unit.full and not unit.items:
            record.complete()
        for group, failures, left in self.passes(arranged):
            record.note({entry.index: entry.item for entry in group}, failures, unit.start)
            record.limit = self.way.limit
            if unit.full and not left:
                record.complete()
            if self.keeper is not None and share.checked and self.keeper.is_due(record):
                self.keeper.write(record, self.analyzers)
            self._show()

    def _show(self) -> None:
        record, (items, skipped) = self.record, self._restored
        fresh = self.ranks.progress(record.items - items, record.skipped - skipped)
        self.bar.show(self.past.items + fresh[0], self.past.skipped + fresh[1])

    def passes(self, arranged: Arranged) -> Iterator[tuple[list[Entry], int, int]]:
        """Run some samples, as many at a time as fit.

        Yields:
            Those that went together, how many of them were skipped, and how many are left.
        """
        pending = arranged.pending
        while pending:
            group = pending[: self.way.take(pending)]
            failures = self._attempt(group, arranged.ready)
            if failures is None:
                # Not within the handler, where the error would still hold what the pass had taken.
                free_memory()
                continue
            for analyzer in self.analyzers if failures else ():
                if isinstance(analyzer, CountsSkipped):
                    analyzer.skip(failures)
            pending = pending[len(group) :]
            yield group, failures, len(pending)

    def _attempt(
        self, group: list[Entry], ready: dict[tuple[int, ...], Inputs] | None = None
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
            if self.way.lower(group):
                return None
            names = ", ".join(entry.name for entry in group)
            error.add_note(f"Memory ran out in a pass over {names}.")
            raise
        for analyzer in self.analyzers:
            analyzer.update(batch)
        return 0

    def _read(self, group: list[Entry], ready: dict[tuple[int, ...], Inputs] | None) -> Batch:
        batch = make_batch(self.model, group, ready)
        _forward(self.model, batch, self.analyzers)
        for analyzer in self.analyzers:
            analyzer.check(batch)
        return batch


def _forward(model: Any, batch: Batch, analyzers: tuple[Analyzer[Any], ...]) -> None:
    hf_model = hf_model_of(model)
    hooks = [hook for analyzer in analyzers for hook in analyzer.hooks(model, batch)]
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=hooks), _one_logit(hf_model) as options:
            hf_model(**batch.inputs, use_cache=False, **options)
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
