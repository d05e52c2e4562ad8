"""Trials: one sample under one condition. Every experiment is read from a table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from miner_lens.data.labelled import labelled
from miner_lens.data.sample import Sample
from miner_lens.data.signature import described
from miner_lens.experiments.condition import Condition
from miner_lens.experiments.scored import SampleTrials, Scored
from miner_lens.experiments.table import Trials
from miner_lens.models.access import identity
from miner_lens.models.bridge import prepared_bridge
from miner_lens.models.collate import Inputs, collate, fit, kinds
from miner_lens.models.features import Features
from miner_lens.models.forcing import Forced, force, logprob, tokenizer_of
from miner_lens.models.forward import evaluating, last_logits
from miner_lens.models.generation import generate_from, input_device, is_greedy, to_device
from miner_lens.models.inside import hf_model_of
from miner_lens.neurons.ablation import PreparedAblation, opened, opened_in_rows
from miner_lens.running.distributed import joined
from miner_lens.running.passes import Sampler
from miner_lens.running.work import Items, work_through

# So many samples are held prepared, media and all, and sorted by their length.
WINDOW = 32
# What is kept of a sample, so that a checkpoint of an older table is not continued.
TABLE = 1

# A sample, or a mapping that `Sample.of` takes.
Item = Sample | Mapping[str, Any]
# How right an answer to a sample is, from 0 to 1.
Metric = Callable[[Sample, str], float]
# What is read of an answer without generating: whether it comes and ends, or whether it comes.
Reading = Literal["exact", "begins"]


def trials(
    model: Any,
    data: Iterable[Item] | Mapping[str, Iterable[Item]],
    conditions: Iterable[Condition],
    batch_size: int = 16,
    progress: bool = True,
    *,
    metric: Metric | Reading = "exact",
    max_new_tokens: int = 16,
    conditions_per_batch: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
) -> Trials:
    """Score each sample's answer under each condition; without generating, unless by a metric.

    The answer is read by the model after the prompt, in one pass for each condition and batch. Its
    log-probability is the sum over its tokens, without the end of the turn. It is correct if greedy
    decoding would give exactly these tokens and then end the turn: each is the most probable after
    the prompt and those before it. With `metric="begins"` the end is not asked for: a model that
    gives the answer and then goes on is right. Of several accepted answers the first is asked for.
    With a function as metric, the model answers as well, which takes longer; `correct` is then what
    the function says of that answer, and the table has it as `answer`. Nothing is generated where
    greedy decoding is known to give the answer that was read.

    Samples are prepared once for all conditions, and those of like length go into a pass together.
    Towers run once for all conditions that switch off neurons of the decoder alone. With
    `value="min"` the minimum is over prompt and answer, where generation takes one for the prompt
    and one for each token. Under torchrun, accelerate or srun each process takes a share of
    the samples, and all get the table; see docs/scaling.md.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, each with its own id if it has one, or a mapping of names to
            samples, which are then labelled by those names.
        conditions: What to switch off, each with its own name.
        batch_size: Samples in one forward pass.
        progress: Whether to show a progress bar.
        metric: `"exact"`, `"begins"`, or a function of a `Sample` and the model's answer that says
            from 0 to 1 how right it is.
        max_new_tokens: The length of an answer at most, where one is generated.
        conditions_per_batch: So many conditions go through the model together, as rows of one
            batch: it has `batch_size` rows for each. Values are the same but for rounding. It pays
            where a pass does not keep the device busy, or where few answers of each condition are
            generated. Conditions on neurons of a tower are tried one by one all the same, and so is
            all that generates by more than the most probable token (beams, a penalty).
        checkpoint: A folder in which to keep what is done, as for `ml.run`. Called again with the
            same model, data and arguments, a table that was stopped, also by SIGKILL, continues to
            the same table, bit for bit; with another number of processes too.
        checkpoint_every: Seconds between two writes.

    Raises:
        ValueError: No data, no condition, two conditions of one name, two samples of one id, a
            sample without answers or with an empty one, a condition that does not fit the model, a
            model without a processor or an end of turn, a batch size or number of conditions below
            1, an MLP that does not keep the rows of a batch apart where conditions share one, an
            unknown metric or one that gives something else than 0 to 1, a checkpoint of another
            table or one that is in use, or processes that differ in model, data or arguments.
        SampleError: A sample cannot be read.
        RankError: Another process has stopped.

    Example:
        conditions = [ml.Condition("intact"), ml.Condition("image", msns["image"])]
        table = ml.trials(model, data, conditions).to_frame()
        table.groupby("condition")["logprob"].mean()
    """
    model = prepared_bridge(model)
    checked = _checked(model, conditions)
    if not callable(metric) and metric not in get_args(Reading):
        raise ValueError(f"metric is 'exact', 'begins' or a function, not {metric!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size!r}.")
    if conditions_per_batch < 1:
        raise ValueError(f"conditions_per_batch must be at least 1, not {conditions_per_batch!r}.")
    asking = _Asking(
        model, checked, batch_size, _ends(model), metric, max_new_tokens, conditions_per_batch
    )
    items = Items(labelled(data) if isinstance(data, Mapping) else data, None)
    settings = {
        "analyzers": [["trials", TABLE]],
        "conditions": [[one.condition.name, one.done] for one in checked],
        "batch_size": batch_size,
        "metric": described(metric) if callable(metric) else metric,
        "max_new_tokens": max_new_tokens if callable(metric) else None,
    }
    if conditions_per_batch > 1:
        settings["conditions_per_batch"] = conditions_per_batch
    with evaluating(model), torch.no_grad(), joined() as ranks:
        sampler = Sampler(max(WINDOW, batch_size), input_device(model))
        seen, _ = work_through(
            ranks,
            model,
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
    names = [one.condition.name for one in checked]
    return asking.scored.table(names, not callable(metric), identity(model))


@dataclass(frozen=True)
class _Checked:
    """A condition that fits the model.

    Attributes:
        condition: Itself.
        ablations: What it comes to.
    """

    condition: Condition
    ablations: list[PreparedAblation]

    @property
    def done(self) -> list[Any]:
        """The ablations, as JSON can hold them."""
        return [one.description for one in self.ablations]

    @property
    def spares_towers(self) -> bool:
        """Whether the model is intact before its decoder."""
        return all(one.site == "llm" for one in self.ablations)

    @property
    def depends_on_length(self) -> bool:
        """Whether a pass over prompt and answer writes what generating would not."""
        return self.condition.value == "min"


@dataclass(frozen=True)
class _Asked:
    """A sample on its way to the model: its number in the data, and itself with its answer."""

    number: int
    sample: Sample
    forced: Forced

    @property
    def name(self) -> str:
        return self.sample.id or f"sample {self.number}"


@dataclass(frozen=True)
class _Read:
    """What a pass over a prompt and its answer says.

    Attributes:
        greedy: The most probable tokens, as many as the answer has, and one for its end.
        begins: Whether these begin with the answer.
        right: Whether these are the answer and an end.
        logprob: The answer's log-probability, in nats.
    """

    greedy: tuple[int, ...]
    begins: bool
    right: bool
    logprob: float

    @classmethod
    def of(
        cls, logits: Float[Tensor, "pos token"], answer: tuple[int, ...], ends: Sequence[int]
    ) -> _Read:
        """What the logits before each of the answer's tokens, and after the last, say."""
        greedy = tuple(logits.argmax(-1).tolist())
        begins = greedy[:-1] == tuple(answer)
        return cls(
            greedy, begins, begins and greedy[-1] in ends, float(logprob(logits[:-1], answer))
        )

    def says(self, metric: Reading) -> float:
        """1 where the answer is right by a metric that needs no more than this, else 0."""
        return float(self.right if metric == "exact" else self.begins)


class _Asking:
    """What is done with a unit of the data: each of its samples under each condition."""

    def __init__(
        self,
        model: Any,
        conditions: Sequence[_Checked],
        batch_size: int,
        ends: Sequence[int],
        metric: Metric | Reading,
        max_new_tokens: int,
        conditions_per_batch: int,
    ) -> None:
        self.scored = Scored()
        self._model, self._conditions, self._ends = model, conditions, ends
        self._batch_size, self._metric = batch_size, metric
        self._max_new_tokens = max_new_tokens
        self._pad = tokenizer_of(model).pad_token_id or 0
        self._greedy = is_greedy(model)
        alone = callable(metric) and not self._greedy
        self._groups = _groups(conditions, 1 if alone else conditions_per_batch)
        self._features = Features(hf_model_of(model))

    def prepare(self, unit: dict[int, Any]) -> list[_Asked]:
        """A unit's samples with their answers, ready for the model."""
        samples = {number: Sample.of(item) for number, item in unit.items()}
        return [_Asked(number, one, force(self._model, one)) for number, one in samples.items()]

    def run(self, asked: list[_Asked]) -> int:
        """Score a unit's samples under all conditions; none is skipped."""
        for batch in _batches(asked, self._batch_size):
            rows = zip(batch, zip(*self._tried(batch), strict=True), strict=True)
            for one, trials_of_it in rows:
                correct, logprobs, answers = zip(*trials_of_it, strict=True)
                given = answers if callable(self._metric) else ()
                row = SampleTrials(one.name, one.sample.label, correct, logprobs, given)
                self.scored.add(one.number, row)
        self.require_own_ids()
        return 0

    def require_own_ids(self) -> None:
        """Refuse samples that a table could not tell apart."""
        if (twice := self.scored.repeated()) is not None:
            raise ValueError(
                f"Two samples have the id {twice!r}, but conditions are compared by sample. "
                "Give each an id of its own, or none."
            )

    def _tried(self, batch: Sequence[_Asked]) -> Iterator[list[tuple[float, float, str]]]:
        """By condition, of each sample: how right it is, its log-probability, and the answer."""
        self._features.forget()
        inputs = {
            copies: self._together([one.forced.inputs for one in batch] * copies)
            for copies in set(map(len, self._groups))
        }
        found = {}
        for group in self._groups:
            rows = iter(self._rows(batch, group, inputs[len(group)]))
            for one in group:
                found[one.condition.name] = list(islice(rows, len(batch)))
        return (found[one.condition.name] for one in self._conditions)

    def _rows(
        self, batch: Sequence[_Asked], group: Sequence[_Checked], inputs: Inputs
    ) -> Iterable[tuple[float, float, str]]:
        """The same of some conditions together, each sample under the first of them first."""
        asked = [*batch] * len(group)
        kept = self._features.kept if group[0].spares_towers else nullcontext
        with self._under(group, [len(batch)] * len(group)), kept(len(group)):
            read = self._read(asked, inputs)
        if not callable(self._metric):
            return [(each.says(self._metric), each.logprob, "") for each in read]
        answers = self._answers(asked, group, read)
        logprobs = (each.logprob for each in read)
        return zip(map(self._judge, asked, answers), logprobs, answers, strict=True)

    def _under(
        self, group: Sequence[_Checked], rows: Sequence[int]
    ) -> AbstractContextManager[None]:
        """A context in which so many rows of a batch are under each of some conditions."""
        if len(group) == 1:
            return opened(self._model, group[0].ablations)
        parts = [(one.ablations, count) for one, count in zip(group, rows, strict=True)]
        return opened_in_rows(self._model, parts)

    def _read(self, batch: Sequence[_Asked], inputs: Inputs) -> list[_Read]:
        """What the model says of each answer, in one pass."""
        hf_model = hf_model_of(self._model)
        lengths = [1 + len(one.forced.answer) for one in batch]
        with last_logits(hf_model, max(lengths)) as options:
            logits = hf_model(**inputs, use_cache=False, **options).logits
        return [
            _Read.of(row[-length:], one.forced.answer, self._ends)
            for one, row, length in zip(batch, logits, lengths, strict=True)
        ]

    def _answers(
        self, asked: Sequence[_Asked], group: Sequence[_Checked], read: Sequence[_Read]
    ) -> list[str]:
        """What the model says by itself, generated where it is not known."""
        size = len(asked) // len(group)
        places = [
            [
                place
                for place in range(n * size, (n + 1) * size)
                if one.depends_on_length or not (self._greedy and read[place].right)
            ]
            for n, one in enumerate(group)
        ]
        rows = [place for some in places for place in some]
        generated: list[str] = []
        if rows:
            prompts = self._together([asked[place].forced.prompt for place in rows])
            with self._under(group, [len(some) for some in places]):
                generated = generate_from(self._model, prompts, self._max_new_tokens)
        decode = tokenizer_of(self._model).decode
        answers = [
            decode(one.greedy[: self._max_new_tokens], skip_special_tokens=True) for one in read
        ]
        for place, answer in zip(rows, generated, strict=True):
            answers[place] = answer
        return answers

    def _together(self, apart: Sequence[Inputs]) -> Inputs:
        """One batch, where the model takes it."""
        return to_device(collate(apart, self._pad), input_device(self._model))

    def _judge(self, one: _Asked, answer: str) -> float:
        """What the metric says of an answer."""
        value = float(self._metric(one.sample, answer)) if callable(self._metric) else 0.0
        if not 0 <= value <= 1:
            raise ValueError(
                f"The metric gave {value} for the answer {answer!r} to {one.name}; expected a "
                "number from 0 (wrong) to 1 (right)."
            )
        return value


def _batches(asked: Sequence[_Asked], batch_size: int) -> Iterator[list[_Asked]]:
    """Samples of like length, with answers of like length, that fit one another."""
    batch: list[_Asked] = []
    for one in sorted(asked, key=lambda one: (one.forced.length, len(one.forced.answer))):
        known = kinds(one.forced.inputs)
        fits = all(fit(kinds(other.forced.inputs), known) for other in batch)
        if len(batch) == batch_size or not fits:
            yield batch
            batch = []
        batch.append(one)
    yield batch


def _checked(model: Any, conditions: Iterable[Condition]) -> list[_Checked]:
    """The conditions, each of which can be applied, and what each does."""
    conditions = list(conditions)
    if not conditions:
        raise ValueError("trials needs at least one condition, such as ml.Condition('intact').")
    if twice := _twice([condition.name for condition in conditions]):
        raise ValueError(f"Two conditions are called {twice!r}; give each a name of its own.")
    # All of them now, not after hours.
    return [_Checked(one, one.prepared(model)) for one in conditions]


def _groups(conditions: Sequence[_Checked], most: int) -> list[list[_Checked]]:
    """Conditions that go through the model together; those on a tower's neurons alone."""
    together = [one for one in conditions if one.spares_towers]
    groups = [together[at : at + most] for at in range(0, len(together), most)]
    return groups + [[one] for one in conditions if not one.spares_towers]


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
