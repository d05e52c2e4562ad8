"""Conditions that go through the model together give what each gives by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import miner_lens as ml
from miner_lens.experiments import asking
from miner_lens.experiments.domains import SitesCondition
from miner_lens.models.access import mlps
from miner_lens.neurons.neuron_set import NeuronSet

# Answers to them are wrong as often as right, so that some are generated.
FRACTION = 0.3


@pytest.fixture(scope="module")
def mixed(shapes: Any) -> list[ml.Condition]:
    """One of every kind."""
    nothing = NeuronSet.of([], shapes)
    total = nothing.layers * nothing.neurons
    one, two = (NeuronSet.random(int(FRACTION * total), nothing, seed) for seed in (0, 1))
    mined = NeuronSet.from_mask(one.mask, means=torch.randn(nothing.mask.shape))
    tower = NeuronSet.of([(0, n) for n in range(99)], shapes, site="vision")
    return [
        ml.Condition("intact"),
        ml.Condition("zero", one),
        ml.Condition("number", two, value=1.5),
        ml.Condition("mean", mined, value="mean"),
        ml.Condition("tower", tower),
        ml.Condition("min", one, value="min"),
        ml.Condition("image", one, value=2.0, at="image"),
        ml.Condition("text", two, at="text"),
        ml.Condition("rest", NeuronSet.random(100, nothing), complement=True),
        SitesCondition("doubled", sets=(two,), by=2.0),
        ml.Condition("intact again"),
    ]


@pytest.fixture(scope="module")
def data() -> Any:
    """Samples of unlike length, with a picture and without."""
    asked = [*ml.datasets.load("easy-vqa", limit=3)]
    asked += ml.datasets.load("easy-vqa", limit=2, ask="text")
    return [*asked[:-1], replace(asked[-1], answers=("a long wrong answer",))]


@contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    """The rows of each call of a module."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda _, __, x: calls.append(len(x)))
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize(("batch_size", "together"), [(5, 4), (2, 99)])
def test_rows_are_as_one_after_another(
    shapes: Any, mixed: Any, data: Any, batch_size: int, together: int
) -> None:
    alone = ml.trials(shapes, data, mixed, batch_size, False)
    with counted(mlps(shapes)[0].activation) as passes:
        rows = ml.trials(shapes, data, mixed, batch_size, False, conditions_per_batch=together)
    assert rows.conditions == alone.conditions
    np.testing.assert_allclose(rows.logprob, alone.logprob, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(rows.correct, alone.correct)
    # Ten conditions together, and one by itself; and what is generated to decide an answer.
    assert sum(passes) >= len(data) * len(mixed)
    assert max(passes) == min(together, 10) * batch_size
    # No two conditions do the same, but for the two that do nothing.
    assert len({tuple(row) for row in alone.logprob.round(4).tolist()}) == len(mixed) - 1


def exactly(sample: ml.Sample, answer: str) -> float:
    return float(answer == sample.answers[0])


def test_answers_are_generated_together(
    shapes: Any, mixed: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many rows for each condition as are not known."""
    sizes: list[int] = []
    generate = asking.generate_from

    def counting(model: Any, inputs: Any, *options: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return generate(model, inputs, *options)

    monkeypatch.setattr(asking, "generate_from", counting)

    def asked(together: int) -> ml.Trials:
        sizes.clear()
        return ml.trials(
            shapes,
            data,
            mixed,
            5,
            False,
            metric=exactly,
            max_new_tokens=2,
            conditions_per_batch=together,
        )

    alone = asked(1)
    calls, generated = len(sizes), sum(sizes)
    rows = asked(5)
    assert rows.answers == alone.answers
    np.testing.assert_array_equal(rows.correct, alone.correct)
    np.testing.assert_allclose(rows.logprob, alone.logprob, atol=1e-5, rtol=0)
    assert sum(sizes) == generated
    assert len(sizes) < calls / 2
    # What else than the most probable token may count knows nothing of rows of ours.
    monkeypatch.setattr(shapes.original_model.generation_config, "repetition_penalty", 1.1)
    asked(5)
    assert len(sizes) == len(mixed)


def test_media_are_looked_at_once_for_all_rows(shapes: Any, mixed: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=6)
    spared = [one for one in mixed if one.name != "tower"]
    with counted(mlps(shapes, "vision")[0].activation) as calls:
        ml.trials(shapes, data, spared, 2, False, conditions_per_batch=4)
    patches = calls[0]
    # Once for each of three batches; at the first, two copies show what several copies give.
    assert calls == [patches, 2 * patches, patches, patches]


def test_a_table_of_rows_continues_as_such(
    shapes: Any, mixed: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ml.trials.__globals__, "WINDOW", 2)

    def table(some: Any, together: int, checkpoint: Path | None = tmp_path) -> ml.Trials:
        return ml.trials(
            shapes,
            some,
            mixed,
            2,
            False,
            conditions_per_batch=together,
            checkpoint=checkpoint,
            checkpoint_every=0,
        )

    def stopped() -> Any:
        yield from data[:5]
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        table(stopped(), 4)
    with pytest.raises(ValueError, match="holds another run"):
        table(data, 1)
    whole = table(data, 4, None)
    np.testing.assert_array_equal(table(data, 4).logprob, whole.logprob)


def test_a_number_of_conditions_below_one_is_refused(shapes: Any, data: Any) -> None:
    with pytest.raises(ValueError, match="conditions_per_batch must be at least 1, not 0"):
        ml.trials(shapes, data, [ml.Condition("intact")], conditions_per_batch=0)
