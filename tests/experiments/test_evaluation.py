from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

import miner_lens as ml
from miner_lens.experiments import evaluation


def test_accuracy_counts_right_answers(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=30)
    given = ml.answers(shapes, data, batch_size=7)
    right = [
        sample.answers[0] == answer.strip() for sample, answer in zip(data, given, strict=True)
    ]
    assert ml.accuracy(shapes, data, batch_size=7) == sum(right) / 30
    assert sum(right) >= 27


def test_batches_and_rendering_once_change_nothing(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=9)
    one_by_one = ml.answers(shapes, iter(data), batch_size=1)
    rendered = list(evaluation.render(shapes, data, batch_size=4))
    assert ml.answers(shapes, rendered) == ml.answers(shapes, rendered) == one_by_one
    assert ml.answers(shapes, evaluation.render(shapes, data, batch_size=4)) == one_by_one


def test_a_table_of_answers(shapes: Any) -> None:
    samples = ml.datasets.load("easy-vqa", limit=9)
    data = [replace(one, answers="purple") if n in (2, 5) else one for n, one in enumerate(samples)]
    given = ml.answers(shapes, iter(data), batch_size=4)
    table = given.to_frame()
    assert list(table.columns) == ["id", "answer", "correct"]
    assert list(table["id"]) == [sample.id for sample in data]
    assert list(table["answer"]) == given == ml.answers(shapes, samples)
    assert table["correct"].mean() == ml.accuracy(shapes, data) == 7 / 9
    assert list(table[~table["correct"]].index) == [2, 5]
    assert pickle.loads(pickle.dumps(given)).to_frame().equals(table)


def test_answers_that_nobody_can_check(shapes: Any) -> None:
    known, *_ = ml.datasets.load("easy-vqa", limit=1, ask="text")
    table = ml.answers(shapes, [ml.Sample(known.messages), known]).to_frame()
    assert table["id"].isna().tolist() == table["correct"].isna().tolist() == [True, False]
    assert table["correct"].mean() == ml.accuracy(shapes, [known])
    assert ml.answers(shapes, []).to_frame().empty


def test_case_and_space_do_not_matter() -> None:
    sample = ml.Sample([], ("Blue", "navy"))
    assert evaluation.is_right(sample, " blue\n")
    assert evaluation.is_right(sample, "NAVY")
    assert not evaluation.is_right(sample, "dark blue")


def test_bad_data(shapes: Any) -> None:
    with pytest.raises(ValueError, match="no data"):
        ml.accuracy(shapes, [])
    unanswered = ml.Sample([{"role": "user", "content": "is it red?"}], (), "q7")
    with pytest.raises(ValueError, match="q7 has no answers"):
        ml.accuracy(shapes, [unanswered])
