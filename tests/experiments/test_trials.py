from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import miner_lens as ml
from miner_lens.experiments import asking
from miner_lens.experiments.asking import Read
from miner_lens.models import forcing
from miner_lens.models.access import mlps
from miner_lens.neurons.neuron_set import NeuronSet
from tests.experiments import naive_logprob

ORGANISMS = [("shapes", "easy-vqa", "image"), ("speech", "spoken-scenes", "audio")]


def some_neurons(model: Any, ratio: float) -> NeuronSet:
    nothing = NeuronSet.of([], model)
    return NeuronSet.random(int(ratio * nothing.layers * nothing.neurons), like=nothing)


@pytest.mark.parametrize(("organism", "name", "medium"), ORGANISMS)
def test_trials_agree_with_generation(organism: str, name: str, medium: str) -> None:
    model = ml.load(organism, device="cpu")
    neurons = some_neurons(model, 0.5)
    conditions = [
        ml.Condition("intact"),
        ml.Condition("off", neurons),
        ml.Condition("half", {"some": neurons}, value=2.0, at="text"),
        ml.Condition("rest", some_neurons(model, 0.3), complement=True),
    ]
    for ask in (medium, "text"):
        data = ml.datasets.load(name, limit=24, ask=ask)
        table = ml.trials(model, data, iter(conditions), batch_size=7).to_frame()
        assert list(table["sample"]) == [sample.id for sample in data] * 4
        for condition, rows in table.groupby("condition"):
            with next(c for c in conditions if c.name == condition).applied(model):
                given = ml.answers(model, data)
            exact = [a == sample.answers[0] for a, sample in zip(given, data, strict=True)]
            assert list(rows["correct"]) == exact, condition
            # An answer that is the most probable one step after another has a good probability.
            assert (rows["logprob"][rows["correct"]] > -5).all()
        rates = table.groupby("condition")["correct"].mean()
        assert rates["intact"] > 0.9 > rates.min()


def test_an_unknown_metric_is_refused(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=2)
    with pytest.raises(ValueError, match="metric is 'exact', 'begins' or a function, not 'anls'"):
        ml.trials(shapes, data, [ml.Condition("intact")], metric="anls")  # type: ignore[arg-type]


def test_an_answer_may_begin_right_and_go_on(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what is generated, by a model whose turn ends with a token that it never says."""
    data = ml.datasets.load("easy-vqa", limit=24)
    conditions = [ml.Condition("intact"), ml.Condition("off", some_neurons(shapes, 0.6))]
    encode = shapes.processor.tokenizer
    never = encode("circle").input_ids[0]
    monkeypatch.setattr(shapes.original_model.generation_config, "eos_token_id", never)
    exact = ml.trials(shapes, data, conditions)
    found = ml.trials(shapes, data, conditions, metric="begins")
    for row, condition in zip(found.correct, conditions, strict=True):
        with condition.applied(shapes):
            given = ml.answers(shapes, data, max_new_tokens=1)
        begun = [
            encode(answer).input_ids[:1] == encode(one.answers[0]).input_ids
            for answer, one in zip(given, data, strict=True)
        ]
        assert row.tolist() == begun
    assert found.correct.dtype == bool
    assert found.correct[0].all()
    assert not found.correct[1].all()
    assert not exact.correct.any()
    np.testing.assert_array_equal(found.logprob, exact.logprob)


@pytest.mark.parametrize(
    ("write", "per_batch"), [(str.upper, 2), (" {}".format, 1), ("{}\n".format, 1)]
)
def test_case_and_surrounding_space_are_passed_over(
    shapes: Any, write: Callable[[str], str], per_batch: int
) -> None:
    """As by `exact_match` of what is generated; the tokens are others than the model says."""
    data = ml.datasets.load("easy-vqa", limit=6)
    data = [replace(one, answers=write(one.answers[0])) for one in data]
    conditions = [ml.Condition("intact"), ml.Condition("off", some_neurons(shapes, 0.6))]
    for metric in ("exact", "begins"):
        found = ml.trials(
            shapes, data, conditions, 7, False, metric=metric, conditions_per_batch=per_batch
        )
        for row, condition in zip(found.correct, conditions, strict=True):
            with condition.applied(shapes):
                given = ml.answers(shapes, data, max_new_tokens=4)
            expected = ml.metrics.exact_match(given, [one.answers for one in data])
            assert row.tolist() == expected
        assert found.correct[0].all()
        assert not found.correct[1].all()


def test_nothing_is_generated_where_the_tokens_tell(
    shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    generate = asking.generate_from

    def counting(model: Any, batch: Any, most: int) -> list[str]:
        asked.append(len(batch["input_ids"]))
        return generate(model, batch, most)

    monkeypatch.setattr(asking, "generate_from", counting)
    data = ml.datasets.load("easy-vqa", limit=6)
    ml.trials(shapes, data, [ml.Condition("intact")], progress=False)
    ml.trials(shapes, [replace(one, answers="zebra") for one in data], [ml.Condition("intact")])
    assert not asked
    upper = [replace(data[0], answers=data[0].answers[0].upper()), *data[1:]]
    ml.trials(shapes, upper, [ml.Condition("intact")], progress=False)
    assert asked == [1]


@pytest.mark.parametrize(
    ("text", "answer", "exact", "begins"),
    [
        (" Red", "red", True, True),
        ("red.", "red", False, True),
        ("Not sure", "no", False, False),
        ("NO, blue", " no", False, True),
        ("yes", "yes and no", False, False),
    ],
)
def test_words_that_are_said(text: str, answer: str, exact: bool, begins: bool) -> None:
    sample = ml.Sample((), answer)
    assert asking.is_said(text, sample, "exact") == exact
    assert asking.is_said(text, sample, "begins") == begins


def test_logprob_is_that_of_the_whole_answer(shapes: Any) -> None:
    """Against a pass with all logits over each sample by itself, for answers of any length."""
    asked = ml.datasets.load("easy-vqa", limit=6)
    asked += ml.datasets.load("easy-vqa", limit=3, ask="text")
    long = ("yes", "a red circle", "no, it is blue", "teal", "yes yes", "the shape is gray")
    data = [replace(one, answers=long[n % 6]) for n, one in enumerate(asked)]
    neurons = some_neurons(shapes, 0.1)
    conditions = [ml.Condition("intact"), ml.Condition("off", neurons, value="zero")]
    found = ml.trials(shapes, data, conditions, batch_size=4)
    intact = [naive_logprob(shapes, sample) for sample in data]
    np.testing.assert_allclose(found.logprob[0], intact, atol=1e-4, rtol=1e-5)
    with ml.ablate(shapes, neurons):
        off = [naive_logprob(shapes, sample) for sample in data]
    np.testing.assert_allclose(found.logprob[1], off, atol=1e-4, rtol=1e-5)
    assert not np.allclose(intact, off, atol=0.01)
    assert (found.logprob < 0).all()


@pytest.mark.parametrize("name", ["shapes", "speech"])
def test_batch_size_changes_nothing(name: str) -> None:
    model = ml.load(name, device="cpu")
    data = ml.datasets.load("easy-vqa" if name == "shapes" else "spoken-scenes", limit=15)
    text = ml.datasets.load("easy-vqa", limit=8, ask="text")
    mixed = [*data[:8], *text, *data[8:]]
    conditions = [ml.Condition("intact"), ml.Condition("off", some_neurons(model, 0.2))]
    alone, together = (ml.trials(model, mixed, conditions, batch_size=n) for n in (1, 23))
    assert together.samples == tuple(sample.id for sample in mixed)
    np.testing.assert_allclose(together.logprob, alone.logprob, atol=1e-5)
    assert (together.correct == alone.correct).all()


def test_windows_change_nothing(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [replace(one, id=None) for one in ml.datasets.load("easy-vqa", limit=11)]
    whole = ml.trials(shapes, data, [ml.Condition("intact")])
    monkeypatch.setitem(ml.trials.__globals__, "WINDOW", 4)
    parts = ml.trials(shapes, iter(data), [ml.Condition("intact")])
    assert whole.samples == parts.samples == tuple(f"sample {n}" for n in range(11))
    np.testing.assert_allclose(whole.logprob, parts.logprob, atol=1e-5)


def test_media_are_prepared_once(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []
    render = forcing.render

    def counting(model: Any, conversations: Any) -> Any:
        rendered.append(conversations)
        return render(model, conversations)

    monkeypatch.setattr(forcing, "render", counting)
    data = ml.datasets.load("easy-vqa", limit=3)
    ml.trials(shapes, data, [ml.Condition(name) for name in "abc"])
    assert len(rendered) == 3


def test_towers_run_once_for_all_conditions_that_spare_them(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=4)
    tower = NeuronSet.of([(0, n) for n in range(99)], shapes, site="vision")
    spared = [ml.Condition("intact"), *(ml.Condition(x, some_neurons(shapes, 0.2)) for x in "ab")]
    conditions = [*spared, ml.Condition("tower", tower), ml.Condition("again")]
    calls: list[int] = []
    layer = mlps(shapes, "vision")[0].activation
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        table = ml.trials(shapes, data, conditions, batch_size=2, progress=False)
    finally:
        handle.remove()
    assert len(calls) == 2 * 2  # in each of two batches: once for all, and once without its own
    alone = [ml.trials(shapes, data, [one], 2, False).logprob[0] for one in conditions]
    np.testing.assert_array_equal(table.logprob, alone)
    assert not np.array_equal(table.logprob[3], table.logprob[0])


def test_the_first_answer_is_asked_for(shapes: Any) -> None:
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    gold = sample.answers[0]
    other = "no" if gold == "yes" else "yes"
    data = [
        replace(sample, answers=(gold, other), id="1"),
        replace(sample, answers=(other, gold), id="2"),
    ]
    found = ml.trials(shapes, data, [ml.Condition("intact")])
    assert found.correct.tolist() == [[True, False]]
    assert found.logprob[0, 0] > found.logprob[0, 1]


def test_an_answer_that_goes_on_is_not_correct(shapes: Any) -> None:
    """A beginning of what the model says is no answer: the turn must end."""
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    end = shapes.original_model.generation_config.eos_token_id
    shapes.original_model.generation_config.eos_token_id = [end, 0]
    try:
        assert ml.trials(shapes, [sample], [ml.Condition("intact")]).correct.all()
        shapes.original_model.generation_config.eos_token_id = [0]
        assert not ml.trials(shapes, [sample], [ml.Condition("intact")]).correct.any()
        shapes.original_model.generation_config.eos_token_id = None
        with pytest.raises(ValueError, match="no token that ends its turn"):
            ml.trials(shapes, [sample], [ml.Condition("intact")])
    finally:
        shapes.original_model.generation_config.eos_token_id = end


def test_half_precision_is_scored_in_single(shapes: Any) -> None:
    logits = torch.randn(3, 50).to(torch.bfloat16)
    read = Read.of(logits, (4, 7), [0])
    wide = logits.double().log_softmax(-1)
    assert read.logprob == pytest.approx(float(wide[0, 4] + wide[1, 7]), abs=1e-5)
    assert not read.right


def test_a_table_and_a_short_form(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=2)
    data = [replace(data[0], label="shape"), data[1]]
    found = ml.trials(shapes, data, [ml.Condition("intact")])
    table = found.to_frame()
    assert list(table.columns) == ["sample", "label", "condition", "correct", "logprob"]
    assert table["label"].isna().tolist() == [False, True]
    assert repr(found).startswith("Trials(2 samples x 1 conditions)\n  intact: 1.000 correct")


def test_bad_trials(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=2)
    intact = ml.Condition("intact")
    with pytest.raises(ValueError, match="no data"):
        ml.trials(shapes, [], [intact])
    with pytest.raises(ValueError, match="at least one condition"):
        ml.trials(shapes, data, [])
    with pytest.raises(ValueError, match="Two conditions are called 'intact'"):
        ml.trials(shapes, data, [intact, intact])
    with pytest.raises(ValueError, match="Two samples have the id 'easy-vqa"):
        ml.trials(shapes, [data[0], data[0]], [intact])
    with pytest.raises(ValueError, match="q7 has no answers"):
        ml.trials(shapes, [*data, ml.Sample(data[0].messages, (), "q7")], [intact])
    with pytest.raises(ValueError, match="q8 has an empty answer"):
        ml.trials(shapes, [ml.Sample(data[0].messages, "", "q8")], [intact])
    foreign = NeuronSet([(0, 1)], layers=2, neurons=4)
    with pytest.raises(ValueError, match="this model's llm has 6 x 384"):
        ml.trials(shapes, data, [intact, ml.Condition("foreign", foreign)])
    with pytest.raises(ValueError, match="no modality 'smell'"):
        ml.trials(shapes, data, [ml.Condition("x", some_neurons(shapes, 0.1), at="smell")])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ml.trials(shapes, data, [intact], batch_size=0)
    with pytest.raises(ValueError, match="but not which neurons"):
        ml.Condition("x", at="image")
    with pytest.raises(ValueError, match="TransformerBridge is needed"):
        ml.trials(shapes.original_model, data, [intact])
    assert ml.trials(shapes, data, [intact]).correct.all()  # nothing is left switched off
