"""Trials: one sample under one condition. Every experiment is read from a table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from miner_lens.data.sample import Sample
from miner_lens.models.bridge import prepared_bridge
from miner_lens.models.collate import collate, fit, kinds
from miner_lens.models.forcing import Forced, force, logprob, tokenizer_of
from miner_lens.models.forward import evaluating, last_logits
from miner_lens.models.generation import input_device, to_device
from miner_lens.models.inside import hf_model_of
from miner_lens.neurons.ablation import Neurons, Value, ablate
from miner_lens.notebook import as_html

if TYPE_CHECKING:
    import pandas as pd

# So many samples are held prepared, media and all, and sorted by their length.
WINDOW = 128

# A sample, or a mapping that `Sample.of` takes.
Item = Sample | Mapping[str, Any]


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


@dataclass(frozen=True, eq=False, repr=False)
class Trials:
    """What became of each sample under each condition.

    Attributes:
        samples: The samples' ids, in the order of the data.
        labels: Their labels.
        conditions: The conditions' names, in the order given.
        correct: `[condition sample]`, whether greedy decoding gives the answer and stops.
        logprob: `[condition sample]`, the log-probability of the answer, in nats.
    """

    samples: tuple[str, ...]
    labels: tuple[str | None, ...]
    conditions: tuple[str, ...]
    correct: np.ndarray[Any, np.dtype[np.bool_]]
    logprob: np.ndarray[Any, np.dtype[np.float64]]

    def to_frame(self) -> pd.DataFrame:
        """A table of the columns sample, label, condition, correct and logprob, one row a trial."""
        import pandas as pd

        return pd.DataFrame(
            {
                "sample": self.samples * len(self.conditions),
                "label": pd.Series(self.labels * len(self.conditions), dtype="str"),
                "condition": np.repeat(np.array(self.conditions, dtype=object), len(self.samples)),
                "correct": self.correct.ravel(),
                "logprob": self.logprob.ravel(),
            }
        ).astype({"sample": "str", "condition": "str"})

    def overview(self) -> pd.DataFrame:
        """Each condition's share of correct answers and mean log-probability of the answer."""
        import pandas as pd

        columns = {"correct": self.correct.mean(1), "logprob": self.logprob.mean(1)}
        return pd.DataFrame(columns, list(self.conditions)).rename_axis("condition")

    def _repr_html_(self) -> str:
        return as_html(repr(self).partition("\n")[0], self.overview())

    def __repr__(self) -> str:
        lines = [f"Trials({len(self.samples)} samples x {len(self.conditions)} conditions)"]
        for name, correct, scored in zip(self.conditions, self.correct, self.logprob, strict=True):
            lines.append(f"  {name}: {correct.mean():.3f} correct, logprob {scored.mean():.3f}")
        return "\n".join(lines)


def trials(
    model: Any,
    data: Iterable[Item],
    conditions: Iterable[Condition],
    batch_size: int = 16,
    progress: bool = True,
) -> Trials:
    """Score each sample's answer under each condition, without generating.

    The answer is read by the model after the prompt, in one pass for each condition and batch. Its
    log-probability is the sum over its tokens, without the end of the turn. It is correct if greedy
    decoding would give exactly these tokens and then end the turn: each is the most probable after
    the prompt and those before it. Of several accepted answers the first is asked for.

    Samples are prepared once for all conditions, and those of like length go into a pass together.
    With `value="min"` the minimum is over prompt and answer, where generation takes one for the
    prompt and one for each token.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, each with its own id if it has one.
        conditions: What to switch off, each with its own name.
        batch_size: Samples in one forward pass.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: No data, no condition, two conditions of one name, two samples of one id, a
            sample without answers or with an empty one, a condition that does not fit the model, a
            model without a processor or an end of turn, or a batch size below 1.
        SampleError: A sample cannot be read.

    Example:
        conditions = [ml.Condition("intact"), ml.Condition("image", msns["image"])]
        table = ml.trials(model, data, conditions).to_frame()
        table.groupby("condition")["logprob"].mean()
    """
    model = prepared_bridge(model)
    conditions = _checked(model, conditions)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size!r}.")
    ends = _ends(model)
    names: list[str] = []
    labels: list[str | None] = []
    correct, logprob = [], []
    samples = map(Sample.of, data)
    total = len(data) * len(conditions) if isinstance(data, Sized) else None
    bar = tqdm(total=total, unit=" trials", disable=not progress)
    with evaluating(model), torch.no_grad(), bar:
        while window := list(islice(samples, WINDOW)):
            names += [one.id or f"sample {len(names) + n}" for n, one in enumerate(window)]
            labels += [one.label for one in window]
            if twice := _twice(names):
                raise ValueError(
                    f"Two samples have the id {twice!r}, but conditions are compared by sample. "
                    "Give each an id of its own, or none."
                )
            asked = [force(model, sample) for sample in window]
            scored = []
            for condition in conditions:
                scored.append(_under(condition, model, asked, ends, batch_size))
                bar.update(len(asked))
            correct.append(np.array([right for right, _ in scored]))
            logprob.append(np.array([total for _, total in scored]))
    if not names:
        raise ValueError("There is no data: the iterable of samples is empty.")
    return Trials(
        tuple(names),
        tuple(labels),
        tuple(condition.name for condition in conditions),
        np.concatenate(correct, axis=1),
        np.concatenate(logprob, axis=1),
    )


def _under(
    condition: Condition, model: Any, asked: list[Forced], ends: Sequence[int], batch_size: int
) -> tuple[list[bool], list[float]]:
    """Whether each sample is correct under a condition, and its answer's log-probability."""
    right, total = [False] * len(asked), [0.0] * len(asked)
    with condition.applied(model):
        for places in _batches(asked, batch_size):
            batch = [asked[place] for place in places]
            logits = _logits(model, batch)
            for place, one, row in zip(places, batch, logits, strict=True):
                scored = row[-len(one.answer) - 1 :]
                right[place], total[place] = _score(scored, one.answer, ends)
    return right, total


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


def _checked(model: Any, conditions: Iterable[Condition]) -> list[Condition]:
    """The conditions, each of which can be applied."""
    conditions = list(conditions)
    if not conditions:
        raise ValueError("trials needs at least one condition, such as ml.Condition('intact').")
    if twice := _twice([condition.name for condition in conditions]):
        raise ValueError(f"Two conditions are called {twice!r}; give each a name of its own.")
    for condition in conditions:
        # All of them now, not after hours.
        with condition.applied(model):
            pass
    return conditions


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
