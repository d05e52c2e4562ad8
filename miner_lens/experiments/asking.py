"""Samples asked under conditions: what a table of trials has a model do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from miner_lens.data.sample import Sample
from miner_lens.experiments.condition import Condition
from miner_lens.experiments.scored import SampleTrials, Scored
from miner_lens.models.collate import Inputs, collate, fit, kinds
from miner_lens.models.features import Features
from miner_lens.models.forcing import Forced, force, logprob, tokenizer_of
from miner_lens.models.forward import last_logits
from miner_lens.models.generation import generate_from, input_device, is_greedy, to_device
from miner_lens.models.inside import hf_model_of
from miner_lens.neurons.ablation import PreparedAblation, opened, opened_in_rows

# How right an answer to a sample is, from 0 to 1.
Metric = Callable[[Sample, str], float]
# What is read of an answer without generating: whether it comes and ends, or whether it comes.
Reading = Literal["exact", "begins"]
# So many tokens more than the answer has may say it in other tokens.
SLACK = 4


@dataclass(frozen=True)
class PreparedCondition:
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
class Asked:
    """A sample on its way to the model: its number in the data, and itself with its answer."""

    number: int
    sample: Sample
    forced: Forced

    @property
    def name(self) -> str:
        """What tables and messages call it."""
        return self.sample.id or f"sample {self.number}"


@dataclass(frozen=True)
class Read:
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
    ) -> Read:
        """What the logits before each of the answer's tokens, and after the last, say."""
        greedy = tuple(logits.argmax(-1).tolist())
        begins = greedy[:-1] == tuple(answer)
        return cls(
            greedy, begins, begins and greedy[-1] in ends, float(logprob(logits[:-1], answer))
        )

    def says(self, metric: Reading) -> float:
        """1 where the answer is right by a metric that needs no more than this, else 0."""
        return float(self.right if metric == "exact" else self.begins)


def is_said(text: str, sample: Sample, metric: Reading) -> bool:
    """Return True if a text is the sample's first answer, or begins with it, case and space aside.

    Example:
        >>> [is_said(" Red.", Sample([], "red"), metric) for metric in ("exact", "begins")]
        [False, True]
    """
    text, answer = text.strip().lower(), sample.answers[0].strip().lower()
    if metric == "exact":
        return text == answer
    return text.startswith(answer) and not text[len(answer) :][:1].isalnum()


class Asking:
    """What is done with a unit of the data: each of its samples under each condition."""

    def __init__(
        self,
        model: Any,
        conditions: Sequence[PreparedCondition],
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

    def prepare(self, unit: dict[int, Any]) -> list[Asked]:
        """A unit's samples with their answers, ready for the model."""
        samples = {number: Sample.of(item) for number, item in unit.items()}
        return [Asked(number, one, force(self._model, one)) for number, one in samples.items()]

    def run(self, asked: list[Asked]) -> int:
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

    def _tried(self, batch: Sequence[Asked]) -> Iterator[list[tuple[float, float, str]]]:
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
        self, batch: Sequence[Asked], group: Sequence[PreparedCondition], inputs: Inputs
    ) -> Iterable[tuple[float, float, str]]:
        """The same of some conditions together, each sample under the first of them first."""
        asked = [*batch] * len(group)
        kept = self._features.kept if group[0].spares_towers else nullcontext
        with self._under(group, [len(batch)] * len(group)), kept(len(group)):
            read = self._read(asked, inputs)
        if not callable(self._metric):
            return self._said(asked, group, read, self._metric)
        answers = self._answers(asked, group, read)
        logprobs = (each.logprob for each in read)
        return zip(map(self._judge, asked, answers), logprobs, answers, strict=True)

    def _under(
        self, group: Sequence[PreparedCondition], rows: Sequence[int]
    ) -> AbstractContextManager[None]:
        """A context in which so many rows of a batch are under each of some conditions."""
        if len(group) == 1:
            return opened(self._model, group[0].ablations)
        parts = [(one.ablations, count) for one, count in zip(group, rows, strict=True)]
        return opened_in_rows(self._model, parts)

    def _read(self, batch: Sequence[Asked], inputs: Inputs) -> list[Read]:
        """What the model says of each answer, in one pass."""
        hf_model = hf_model_of(self._model)
        lengths = [1 + len(one.forced.answer) for one in batch]
        with last_logits(hf_model, max(lengths)):
            logits = hf_model(**inputs, use_cache=False).logits
        return [
            Read.of(row[-length:], one.forced.answer, self._ends)
            for one, row, length in zip(batch, logits, lengths, strict=True)
        ]

    def _said(
        self,
        asked: Sequence[Asked],
        group: Sequence[PreparedCondition],
        read: Sequence[Read],
        metric: Reading,
    ) -> list[tuple[float, float, str]]:
        """Whether the model says each answer; where it may in other tokens, it is asked."""
        correct = [each.says(metric) for each in read]
        open_ = [
            place
            for place, one in enumerate(asked)
            if not correct[place] and self._is_open(one, read[place], metric)
        ]
        longest = max(len(one.forced.answer) for one in asked)
        for place, text in self._generated(asked, group, open_, longest + SLACK).items():
            correct[place] = float(is_said(text, asked[place].sample, metric))
        return [(value, each.logprob, "") for value, each in zip(correct, read, strict=True)]

    def _is_open(self, one: Asked, read: Read, metric: Reading) -> bool:
        """True if greedy decoding leaves the answer's tokens, but maybe not its words."""
        agreed = zip(read.greedy, one.forced.answer, strict=False)
        at = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], agreed))
        ended = read.greedy[at] in self._ends
        said = tokenizer_of(self._model).decode(read.greedy[: at + 1 - ended])
        said = said.strip().rstrip("\ufffd").lower()  # what stands for half a character
        wanted = one.sample.answers[0].strip().lower()
        begun = said == wanted if metric == "exact" else said.startswith(wanted)
        return self._greedy and (begun or (not ended and wanted.startswith(said)))

    def _answers(
        self, asked: Sequence[Asked], group: Sequence[PreparedCondition], read: Sequence[Read]
    ) -> list[str]:
        """What the model says by itself, generated where it is not known."""
        size = len(asked) // len(group)
        rows = [
            place
            for place in range(len(asked))
            if group[place // size].depends_on_length or not (self._greedy and read[place].right)
        ]
        generated = self._generated(asked, group, rows, self._max_new_tokens)
        decode = tokenizer_of(self._model).decode
        return [
            generated[place]
            if place in generated
            else decode(one.greedy[: self._max_new_tokens], skip_special_tokens=True)
            for place, one in enumerate(read)
        ]

    def _generated(
        self,
        asked: Sequence[Asked],
        group: Sequence[PreparedCondition],
        rows: Sequence[int],
        max_new_tokens: int,
    ) -> dict[int, str]:
        """Answers that are generated in one batch, by row, each under its row's condition."""
        if not rows:
            return {}
        size = len(asked) // len(group)
        counts = [sum(place // size == n for place in rows) for n in range(len(group))]
        prompts = self._together([asked[place].forced.prompt for place in rows])
        with self._under(group, counts):
            answers = generate_from(self._model, prompts, max_new_tokens)
        return dict(zip(rows, answers, strict=True))

    def _together(self, apart: Sequence[Inputs]) -> Inputs:
        """One batch, where the model takes it."""
        return to_device(collate(apart, self._pad), input_device(self._model))

    def _judge(self, one: Asked, answer: str) -> float:
        """What the metric says of an answer."""
        value = float(self._metric(one.sample, answer)) if callable(self._metric) else 0.0
        if not 0 <= value <= 1:
            raise ValueError(
                f"The metric gave {value} for the answer {answer!r} to {one.name}; expected a "
                "number from 0 (wrong) to 1 (right)."
            )
        return value


def _batches(asked: Sequence[Asked], batch_size: int) -> Iterator[list[Asked]]:
    """Samples of like length, with answers of like length, that fit one another."""
    batch: list[Asked] = []
    for one in sorted(asked, key=lambda one: (one.forced.length, len(one.forced.answer))):
        known = kinds(one.forced.inputs)
        fits = all(fit(kinds(other.forced.inputs), known) for other in batch)
        if len(batch) == batch_size or not fits:
            yield batch
            batch = []
        batch.append(one)
    yield batch


def _groups(conditions: Sequence[PreparedCondition], most: int) -> list[list[PreparedCondition]]:
    """Conditions that go through the model together; those on a tower's neurons alone."""
    together = [one for one in conditions if one.spares_towers]
    groups = [together[at : at + most] for at in range(0, len(together), most)]
    return groups + [[one] for one in conditions if not one.spares_towers]
