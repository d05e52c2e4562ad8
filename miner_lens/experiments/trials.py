"""Trials: one sample under one condition. Every experiment is read from a table of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miner_lens.data.labelled import labelled
from miner_lens.data.sample import Sample
from miner_lens.data.signature import described
from miner_lens.experiments.scored import SampleTrials, Scored
from miner_lens.experiments.table import Trials
from miner_lens.models.access import identity
from miner_lens.models.bridge import prepared_bridge
from miner_lens.models.collate import collate, fit, kinds
from miner_lens.models.forcing import Forced, force, logprob, tokenizer_of
from miner_lens.models.forward import evaluating, last_logits
from miner_lens.models.generation import generate_from, input_device, to_device
from miner_lens.models.inside import hf_model_of
from miner_lens.neurons.ablation import Neurons, Value, ablate
from miner_lens.neurons.active import active
from miner_lens.running.batches import Sampler
from miner_lens.running.distributed import joined
from miner_lens.running.shards import Items
from miner_lens.running.work import state_of, work_through

# So many samples are held prepared, media and all, and sorted by their length.
WINDOW = 32
# What is kept of a sample, so that a checkpoint of an older table is not continued.
TABLE = 1

# A sample, or a mapping that `Sample.of` takes.
Item = Sample | Mapping[str, Any]
# How right an answer to a sample is, from 0 to 1.
Metric = Callable[[Sample, str], float]


@dataclass(frozen=True)
class Condition:
    """What is switched off in a trial.

    Attributes:
        name: What tables call it.
        neurons: The neurons to switch off, or what `select` returns; None: the model is intact.
        value: What is written into them, as for `ablate`.
        at: At the tokens of which modality only, as for `ablate`.
        complement: Whether to switch off every neuron but these, as for `ablate`.

    Raises:
        ValueError: It says how to ablate, but no neurons.

    Example:
        >>> Condition("intact")
        Condition(name='intact', neurons=None, value='zero', at=None, complement=False)
    """

    name: str
    neurons: Neurons | None = None
    value: Value = "zero"
    at: str | None = None
    complement: bool = False

    def __post_init__(self) -> None:
        if self.neurons is None and (self.value, self.at, self.complement) != ("zero", None, False):
            raise ValueError(
                f"Condition {self.name!r} says how to ablate, but not which neurons. Give neurons, "
                "or leave value, at and complement out for the intact model."
            )

    def applied(self, model: Any) -> AbstractContextManager[None]:
        """A context in which the model is under this condition.

        Raises:
            ValueError: As `ablate`.
        """
        if self.neurons is None:
            return nullcontext()
        return ablate(model, self.neurons, self.value, self.at, self.complement)


def trials(
    model: Any,
    data: Iterable[Item] | Mapping[str, Iterable[Item]],
    conditions: Iterable[Condition],
    batch_size: int = 16,
    progress: bool = True,
    *,
    metric: Metric | None = None,
    max_new_tokens: int = 16,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
) -> Trials:
    """Score each sample's answer under each condition; without generating, unless by a metric.

    The answer is read by the model after the prompt, in one pass for each condition and batch. Its
    log-probability is the sum over its tokens, without the end of the turn. It is correct if greedy
    decoding would give exactly these tokens and then end the turn: each is the most probable after
    the prompt and those before it. Of several accepted answers the first is asked for. With a
    metric, the model answers as well, which takes longer; `correct` is then what the metric says of
    that answer, and the table has it as `answer`.

    Samples are prepared once for all conditions, and those of like length go into a pass together.
    With `value="min"` the minimum is over prompt and answer, where generation takes one for the
    prompt and one for each token. Under torchrun, accelerate or srun each process takes a share of
    the samples, and all get the table; see docs/scaling.md.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, each with its own id if it has one, or a mapping of names to
            samples, which are then labelled by those names.
        conditions: What to switch off, each with its own name.
        batch_size: Samples in one forward pass.
        progress: Whether to show a progress bar.
        metric: A function of a `Sample` and the model's answer that says from 0 to 1 how right it
            is.
        max_new_tokens: The length of an answer at most, where there is a metric.
        checkpoint: A folder in which to keep what is done, as for `ml.run`. Called again with the
            same model, data and arguments, a table that was stopped, also by SIGKILL, continues to
            the same table, bit for bit; with another number of processes too.
        checkpoint_every: Seconds between two writes.

    Raises:
        ValueError: No data, no condition, two conditions of one name, two samples of one id, a
            sample without answers or with an empty one, a condition that does not fit the model, a
            model without a processor or an end of turn, a batch size below 1, a metric that gives
            something else than 0 to 1, a checkpoint of another table or one that is in use, or
            processes that differ in model, data or arguments.
        SampleError: A sample cannot be read.
        RankError: Another process has stopped.

    Example:
        conditions = [ml.Condition("intact"), ml.Condition("image", msns["image"])]
        table = ml.trials(model, data, conditions).to_frame()
        table.groupby("condition")["logprob"].mean()
    """
    model = prepared_bridge(model)
    conditions, done_to = _checked(model, conditions)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size!r}.")
    asking = _Asking(model, conditions, batch_size, _ends(model), metric, max_new_tokens)
    items = Items(labelled(data) if isinstance(data, Mapping) else data, None)
    with evaluating(model), torch.no_grad(), joined(checkpoint) as ranks:
        settings: dict[str, Any] = {}
        if ranks.world_size > 1 or checkpoint is not None:
            settings = state_of(model) | {
                "analyzers": [["trials", TABLE]],
                "conditions": done_to,
                "batch_size": batch_size,
                "metric": described(metric),
                "max_new_tokens": max_new_tokens if metric else None,
            }
        sampler = Sampler(max(WINDOW, batch_size), input_device(model))
        seen, _ = work_through(
            ranks,
            items,
            [asking.scored],
            sampler,
            prepare=asking.prepare,
            work=asking.run,
            settings=settings,
            checkpoint=checkpoint,
            seconds=checkpoint_every,
            progress=progress,
        )
    if not seen:
        raise ValueError("There is no data: the iterable of samples is empty.")
    asking.require_own_ids()  # of all processes now
    names = [condition.name for condition in conditions]
    return asking.scored.table(names, metric is None, identity(model))


@dataclass(frozen=True)
class _Asked:
    """A sample on its way to the model: its number in the data, and itself with its answer."""

    number: int
    sample: Sample
    forced: Forced

    @property
    def name(self) -> str:
        return self.sample.id or f"sample {self.number}"


class _Asking:
    """What is done with a unit of the data: each of its samples under each condition."""

    def __init__(
        self,
        model: Any,
        conditions: Sequence[Condition],
        batch_size: int,
        ends: Sequence[int],
        metric: Metric | None,
        max_new_tokens: int,
    ) -> None:
        self.scored = Scored()
        self._model, self._conditions, self._ends = model, conditions, ends
        self._batch_size, self._metric = batch_size, metric
        self._max_new_tokens = max_new_tokens

    def prepare(self, unit: dict[int, Any]) -> list[_Asked]:
        """A unit's samples with their answers, ready for the model."""
        samples = {number: Sample.of(item) for number, item in unit.items()}
        return [_Asked(number, one, force(self._model, one)) for number, one in samples.items()]

    def run(self, asked: list[_Asked]) -> int:
        """Score a unit's samples under all conditions; none is skipped."""
        correct: list[list[float]] = [[] for _ in asked]
        logprobs: list[list[float]] = [[] for _ in asked]
        answers: list[list[str]] = [[] for _ in asked]
        for condition in self._conditions:
            with condition.applied(self._model):
                for places in _batches([one.forced for one in asked], self._batch_size):
                    batch = [asked[place] for place in places]
                    for place, (right, total) in zip(places, self._force(batch), strict=True):
                        correct[place].append(right)
                        logprobs[place].append(total)
                    if self._metric is not None:
                        for place, answer in zip(places, self._answer(batch), strict=True):
                            answers[place].append(answer)
                            correct[place][-1] = self._judge(asked[place], answer)
        for place, one in enumerate(asked):
            row = (correct[place], logprobs[place], answers[place])
            self.scored.add(one.number, SampleTrials(one.name, one.sample.label, *row))
        self.require_own_ids()
        return 0

    def require_own_ids(self) -> None:
        """Refuse samples that a table could not tell apart."""
        if (twice := self.scored.repeated()) is not None:
            raise ValueError(
                f"Two samples have the id {twice!r}, but conditions are compared by sample. "
                "Give each an id of its own, or none."
            )

    def _force(self, batch: Sequence[_Asked]) -> Iterator[tuple[float, float]]:
        """Whether each sample is correct, and its answer's log-probability."""
        forced = [one.forced for one in batch]
        for one, row in zip(forced, _logits(self._model, forced), strict=True):
            yield _score(row[-len(one.answer) - 1 :], one.answer, self._ends)

    def _answer(self, batch: Sequence[_Asked]) -> list[str]:
        """What the model says by itself."""
        pad = tokenizer_of(self._model).pad_token_id or 0
        prompts = collate([one.forced.prompt for one in batch], pad)
        given = to_device(prompts, input_device(self._model))
        return generate_from(self._model, given, self._max_new_tokens)

    def _judge(self, one: _Asked, answer: str) -> float:
        """What the metric says of an answer."""
        value = float(self._metric(one.sample, answer)) if self._metric else 0.0
        if not 0 <= value <= 1:
            raise ValueError(
                f"The metric gave {value} for the answer {answer!r} to {one.name}; expected a "
                "number from 0 (wrong) to 1 (right)."
            )
        return value


def _batches(asked: list[Forced], batch_size: int) -> Iterator[list[int]]:
    """Places of samples of like length that fit one another."""
    order = sorted(range(len(asked)), key=lambda place: asked[place].length)
    batch: list[int] = []
    for place in order:
        fits = all(fit(kinds(asked[other].inputs), kinds(asked[place].inputs)) for other in batch)
        if len(batch) == batch_size or not fits:
            yield batch
            batch = []
        batch.append(place)
    yield batch


def _logits(model: Any, batch: list[Forced]) -> Tensor:
    """`[sample pos vocabulary]` where an answer or the end of one is predicted, at the end."""
    together = collate([one.inputs for one in batch], tokenizer_of(model).pad_token_id or 0)
    hf_model = hf_model_of(model)
    count = 1 + max(len(one.answer) for one in batch)
    with last_logits(hf_model, count) as options:
        output = hf_model(**to_device(together, input_device(model)), use_cache=False, **options)
    logits: Tensor = output.logits[:, -count:]
    return logits


def _score(logits: Tensor, answer: tuple[int, ...], ends: Sequence[int]) -> tuple[bool, float]:
    """Whether the most probable tokens are the answer and an end; the answer's log-probability."""
    *best, last = logits.argmax(-1).tolist()
    return tuple(best) == answer and last in ends, float(logprob(logits[:-1], answer))


def _checked(
    model: Any, conditions: Iterable[Condition]
) -> tuple[list[Condition], list[tuple[str, list[Any]]]]:
    """The conditions, each of which can be applied, and what each does, as JSON can hold it."""
    conditions = list(conditions)
    if not conditions:
        raise ValueError("trials needs at least one condition, such as ml.Condition('intact').")
    if twice := _twice([condition.name for condition in conditions]):
        raise ValueError(f"Two conditions are called {twice!r}; give each a name of its own.")
    hf_model = hf_model_of(model)
    before = len(active(hf_model))
    done_to: list[tuple[str, list[Any]]] = []
    for condition in conditions:
        # All of them now, not after hours.
        with condition.applied(model):
            done_to.append((condition.name, active(hf_model)[before:]))
    return conditions, json.loads(json.dumps(done_to))


def _twice(names: Sequence[str]) -> str | None:
    """A name that occurs more than once."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _ends(model: Any) -> list[int]:
    """The tokens at which generation stops."""
    config = getattr(hf_model_of(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        raise ValueError(
            "The model has no token that ends its turn, so no answer is whole. Set "
            "model.original_model.generation_config.eos_token_id."
        )
    return [ends] if isinstance(ends, int) else list(ends)
