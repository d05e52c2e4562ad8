"""A unit of the data on its way through the model: in which passes, and what may go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from miner_lens.data.items import prepared_pair
from miner_lens.data.sample import Sample, SampleError
from miner_lens.models.access import layout
from miner_lens.models.collate import collate, fit, kinds
from miner_lens.models.forcing import force, logprob, tokenizer_of
from miner_lens.models.forward import differentiable, last_logits
from miner_lens.models.generation import Inputs, input_device, render, to_device
from miner_lens.models.inside import hf_model_of
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch, prompt_of
from miner_lens.running.hooks import pass_hooks, require_positions

BatchSize = int | Literal["auto"]
OnError = Literal["raise", "skip"]
# Log-probability of a sample's first answer, or a function of logits [sample pos token] and batch.
Objective = Literal["answer"] | Callable[[Tensor, Batch], Tensor]

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
    opening: int = 0  # how many tokens open the answer, after a conversation that awaits none
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
                return replace(
                    bare, inputs=forced.inputs, answer=forced.answer, opening=forced.opening
                )
            return replace(bare, inputs=render(model, [value.messages]))
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
    apart = [item.inputs for item in items if item.inputs is not None]
    inputs = to_device(collate(apart, tokenizer_of(model).pad_token_id or 0), device)
    answers = tuple(item.answer for item in items)
    tails = tuple(item.opening + len(item.answer) for item in items)
    real = prompt_of(inputs, tails) if any(tails) else inputs.get("attention_mask")
    masks = layout(model).masks(inputs["input_ids"], real)
    values, numbers = tuple(item.value for item in items), tuple(item.number for item in items)
    ids = tuple(item.name for item in items)
    return Batch(inputs, masks, ids, values, numbers, answers, tails)


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
            items, short = self.sampler.take(pending), False
            try:
                self._accept(items)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                if len(items) > 1:
                    skipped += sum(self.run([one]) for one in items)
                else:
                    skipped += 1
                    for analyzer in self.analyzers:
                        analyzer.skip(str(error))
            except (RuntimeError, MemoryError) as error:
                if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                    raise
                if not self.sampler.lower(items):
                    names = ", ".join(item.name for item in items)
                    error.add_note(f"Memory ran out in a pass over {names}.")
                    raise
                short = True
            if short:
                # Not within the handler, where the error would still hold what the pass had taken.
                clear_device_cache(garbage_collection=True)
            else:
                pending = pending[len(items) :]
        return skipped

    def _accept(self, items: Sequence[Item]) -> None:
        """Run items together; all analyzers accept the pass, or none does."""
        batch = make_batch(self.model, items)
        forward(self.model, batch, self.analyzers, self.objective)
        for analyzer in self.analyzers:
            analyzer.check(batch)
        for analyzer in self.analyzers:
            analyzer.accept(batch)


def forward(
    model: Any, batch: Batch, analyzers: Sequence[Analyzer[Any]], objective: Objective | None
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
    towers = [one.tower.module(hf_model) for site, one in batch.towers.items() if site in wanted]
    grad = torch.no_grad() if objective is None else differentiable(hf_model, towers)
    try:
        with grad, model.hooks(fwd_hooks=hooks), last_logits(hf_model, count):
            output = hf_model(**batch.inputs, use_cache=False)
    except SampleError:
        raise
    except ValueError as error:
        # Such as fewer placeholders than the media have tokens.
        raise SampleError(f"{', '.join(batch.ids)}: the model refuses it: {error}") from error
    finally:
        for tower in batch.towers.values():
            tower.close()
    if count is None:
        require_positions(output.logits, "logits", batch)
    if objective is not None:
        _descend(output.logits, batch, objective if callable(objective) else answer_logprob)
        output.logits = output.logits.detach()
    batch.once("output", lambda: output)
    for analyzer in analyzers:
        analyzer.end(batch)


def answer_logprob(logits: Tensor, batch: Batch) -> Tensor:
    """The log-probability of each sample's answer, whose tokens are the last ones."""
    answers = zip(logits, batch.answers, strict=True)
    return torch.stack([logprob(row[-len(answer) - 1 : -1], answer) for row, answer in answers])


def _descend(logits: Tensor, batch: Batch, objective: Callable[[Tensor, Batch], Tensor]) -> None:
    """Send gradients back from the objective, which analyzers see at their points."""
    with torch.enable_grad():
        value = objective(logits, batch)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise ValueError(
            "The objective must return a tensor that has a gradient with respect to the "
            f"logits it is given; it returned {type(value).__name__}."
        )
    # Samples do not see each other, so each one's gradient is that of its own part of the sum.
    value.sum().backward()  # type: ignore[no-untyped-call]
