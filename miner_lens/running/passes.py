"""The passes of a run: a rank's units of the data through the model, and what may go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from miner_lens.data.sample import SampleError
from miner_lens.models.forcing import logprob
from miner_lens.models.forward import differentiable, last_logits
from miner_lens.models.inside import hf_model_of
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.running.batches import Item, Sampler, make_batch
from miner_lens.running.hooks import pass_hooks

OnError = Literal["raise", "skip"]
# Log-probability of a sample's first answer, or a function of logits [sample pos token] and batch.
Objective = Literal["answer"] | Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Passes:
    """Passes over units of the data, with analyzers reading along."""

    model: Any
    analyzers: Sequence[Analyzer[Any]]
    on_error: OnError
    sampler: Sampler
    objective: Objective | None = None

    def prepare(self, unit: dict[int, Any]) -> list[Item]:
        """What can be done for a unit while the model is busy with the one before."""
        answered = self.objective == "answer"
        return self.sampler.arrange(
            [Item.prepared(self.model, number, one, answered) for number, one in unit.items()]
        )

    def run(self, pending: list[Item]) -> int:
        """Run a prepared unit, as many items at a time as fit; how many samples were skipped."""
        skipped = 0
        while pending:
            items = self.sampler.take(pending)
            failed = self._attempt(items)
            if failed is None:
                # Not within the handler, where the error would still hold what the pass had taken.
                clear_device_cache(garbage_collection=True)
                continue
            skipped += failed
            pending = pending[len(items) :]
        return skipped

    def _attempt(self, items: Sequence[Item]) -> int | None:
        """Run items together, or one by one where that fails and may; how many were skipped.

        It is None if memory ran out and less is to be tried.
        """
        try:
            batch = make_batch(self.model, items)
            forward(self.model, batch, self.analyzers, self.objective)
            for analyzer in self.analyzers:
                analyzer.check(batch)
        except SampleError as error:
            if self.on_error == "raise":
                raise
            if len(items) > 1:
                return sum(self._attempt([one]) or 0 for one in items)
            for analyzer in self.analyzers:
                analyzer.skip(str(error))
            return 1
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
            if self.sampler.lower(items):
                return None
            names = ", ".join(item.name for item in items)
            error.add_note(f"Memory ran out in a pass over {names}.")
            raise
        for analyzer in self.analyzers:
            analyzer.accept(batch)
        return 0


def forward(
    model: Any,
    batch: Batch,
    analyzers: Sequence[Analyzer[Any]],
    objective: Objective | None = None,
) -> None:
    """One pass, prefill only, with analyzers reading along; SampleError if the model refuses.

    With an objective, there is a backward pass from it.
    """
    hf_model = hf_model_of(model)
    for analyzer in analyzers:
        analyzer.open(batch, hf_model)
    hooks = pass_hooks(analyzers, model, lambda: batch)
    count: int | None = 1 + max(map(len, batch.answers), default=0)
    if any(analyzer.needs_logits for analyzer in analyzers) or callable(objective):
        count = None
    wanted = {p.site for one in analyzers if one.needs_gradients for p in one.reading}
    read = (tower for site, tower in batch.towers.items() if site in wanted)
    towers = [tower.tower.module(hf_model) for tower in read]
    grad = torch.no_grad() if objective is None else differentiable(hf_model, towers)
    try:
        with grad, model.hooks(fwd_hooks=hooks), last_logits(hf_model, count) as options:
            output = hf_model(**batch.inputs, use_cache=False, **options)
    except SampleError:
        raise
    except ValueError as error:
        # Such as fewer placeholders than the media have tokens.
        raise SampleError(f"{', '.join(batch.ids)}: the model refuses it: {error}") from error
    if objective is not None:
        _descend(output.logits, batch, objective)
        output.logits = output.logits.detach()
    batch.once("output", lambda: output)
    for analyzer in analyzers:
        analyzer.end(batch)


def _descend(logits: Tensor, batch: Batch, objective: Objective) -> None:
    """Send gradients back from the objective, which analyzers see at their points."""
    if callable(objective):
        with torch.enable_grad():
            value = objective(logits, batch)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ValueError(
                "The objective must return a tensor that has a gradient with respect to the "
                f"logits it is given; it returned {type(value).__name__}."
            )
    else:
        with torch.enable_grad():
            scored = [
                logprob(row[-len(answer) - 1 : -1], answer)
                for row, answer in zip(logits, batch.answers, strict=True)
            ]
            value = torch.stack(scored)
    # Samples do not see each other, so each one's gradient is that of its own part of the sum.
    value.sum().backward()  # type: ignore[no-untyped-call]
