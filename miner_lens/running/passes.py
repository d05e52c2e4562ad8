"""The passes of a run: a rank's units of the data through the model, and what may go wrong."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from miner_lens.data.sample import SampleError
from miner_lens.models import attention
from miner_lens.models.bridge import hf_model_of
from miner_lens.models.generation import Inputs
from miner_lens.running.analyzer import Analyzer, pass_hooks
from miner_lens.running.batch import Batch
from miner_lens.running.batches import Item, Sampler, free_memory, is_out_of_memory, make_batch

OnError = Literal["raise", "skip"]


class Passes:
    """Passes over units of the data, with analyzers reading along.

    Args:
        model: A `TransformerBridge`.
        analyzers: They read along.
        on_error: What to do with a sample that cannot be used.
        sampler: Says which items go together.
    """

    def __init__(
        self, model: Any, analyzers: tuple[Analyzer[Any], ...], on_error: OnError, sampler: Sampler
    ) -> None:
        self.model, self.analyzers = model, analyzers
        self.on_error, self.sampler = on_error, sampler

    def prepare(self, unit: dict[int, Any]) -> list[Item]:
        """What can be done for a unit while the model is busy with the one before."""
        items = [Item.prepared(self.model, number, value) for number, value in unit.items()]
        return self.sampler.arrange(items)

    def run(self, pending: list[Item]) -> int:
        """Run a prepared unit, as many items at a time as fit; how many samples were skipped."""
        skipped = 0
        while pending:
            items = self.sampler.take(pending)
            failed = self._attempt(items)
            if failed is None:
                # Not within the handler, where the error would still hold what the pass had taken.
                free_memory()
                continue
            skipped += failed
            pending = pending[len(items) :]
        for analyzer in self.analyzers:
            analyzer.skip(skipped)
        return skipped

    def _attempt(self, items: Sequence[Item]) -> int | None:
        """Run items together, or one by one where that fails and may.

        Returns:
            How many were skipped; None if memory ran out and less is to be tried.
        """
        try:
            batch = make_batch(self.model, items)
            forward(self.model, batch, self.analyzers)
            for analyzer in self.analyzers:
                analyzer.check(batch)
        except SampleError:
            if self.on_error == "raise":
                raise
            return 1 if len(items) == 1 else sum(self._attempt([one]) or 0 for one in items)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.sampler.lower(items):
                return None
            names = ", ".join(item.name for item in items)
            error.add_note(f"Memory ran out in a pass over {names}.")
            raise
        for analyzer in self.analyzers:
            analyzer.accept(batch)
        return 0


def forward(model: Any, batch: Batch, analyzers: Sequence[Analyzer[Any]]) -> None:
    """One pass, prefill only, with analyzers reading along.

    Raises:
        SampleError: The model refuses a sample.
    """
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
