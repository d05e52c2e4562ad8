"""Evaluating: answers as `answers` gives them, values as the metrics do, honest intervals."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import miner_lens as ml
from miner_lens.experiments.evaluate import Evaluation

COLUMNS = ["sample", "label", "answer"]


def test_values_are_those_of_the_metrics(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=9)
    result = ml.evaluate(shapes, data, ["exact_match", "containment"], 4, max_new_tokens=16)
    given = ml.answers(shapes, data, max_new_tokens=16)
    assert list(result.frame.columns) == [*COLUMNS, "exact_match", "containment"]
    assert list(result.frame["answer"]) == given
    assert list(result.frame["sample"]) == [sample.id for sample in data]
    assert result.frame["exact_match"].mean() == ml.accuracy(shapes, data)


def test_data_sets_measure_by_their_own_metrics(shapes: Any, tmp_path: Path) -> None:
    named = ml.datasets.load("easy-vqa", limit=6, ask="text")
    named.metrics = ("containment",)
    plain = [replace(named[n], answers="purple", id=f"p{n}") for n in range(2)]
    result = ml.evaluate(shapes, {"named": named[:4], "plain": plain}, max_new_tokens=4)
    assert list(result.frame.columns) == [*COLUMNS, "containment", "exact_match"]
    assert list(result.frame["label"]) == ["named"] * 4 + ["plain"] * 2
    assert result.frame["containment"].isna().tolist() == [False] * 4 + [True] * 2
    means = result.means
    assert list(means["metric"]) == ["containment", "exact_match"]
    assert list(means["samples"]) == [4, 2]
    assert means["mean"].iloc[1] == 0
    result.save(tmp_path / "evaluation.safetensors")
    loaded = Evaluation.load(tmp_path / "evaluation.safetensors")
    pd.testing.assert_frame_equal(loaded.frame, result.frame)
    assert loaded.summary == result.summary
    assert "plain exact_match 0.000 [0.000, 0.000] of 2" in result.summary
    assert len(result.figure().axes) == 2


def test_what_is_switched_off_stays_off(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=6, ask="text")
    intact = ml.evaluate(shapes, data, max_new_tokens=4)
    every = ml.mine(shapes, data, progress=False).select(ratio=1.0, strategy="adaptive")
    with ml.ablate(shapes, every):
        off = ml.evaluate(shapes, data, max_new_tokens=4)
    assert intact.frame["exact_match"].mean() > off.frame["exact_match"].mean()


def evaluation(values: np.ndarray) -> Evaluation:
    count = len(values)
    columns = {"sample": [f"s{n}" for n in range(count)], "label": None, "answer": ""}
    return Evaluation(pd.DataFrame(columns | {"score": values}))


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    """Of 200 draws of 60 answers right at 0.7; at 0.94, what percentile intervals of 60 samples
    reach, 188 are expected, with a standard deviation of 3.4."""
    draws = np.random.default_rng(0).random((200, 60)) < 0.7
    ends = [evaluation(draw.astype(float)).means.iloc[0] for draw in draws]
    covered = sum(row["low"] <= 0.7 <= row["high"] for row in ends)
    assert 176 <= covered <= 198


def test_a_single_sample_has_no_interval() -> None:
    means = evaluation(np.array([1.0])).means
    assert means["mean"].tolist() == [1]
    assert means[["low", "high"]].isna().all(axis=None)
    assert "score 1.000 [nan, nan] of 1" in evaluation(np.array([1.0])).summary


def test_bad_data(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (sample,) = ml.datasets.load("easy-vqa", limit=1, ask="text")
    with pytest.raises(ValueError, match="no data"):
        ml.evaluate(shapes, [])
    with pytest.raises(ValueError, match="no data in 'empty'"):
        ml.evaluate(shapes, {"empty": []})
    with pytest.raises(ValueError, match="has no answers"):
        ml.evaluate(shapes, [replace(sample, answers=())])
    with pytest.raises(ValueError, match=f"Two samples have the id '{sample.id}'"):
        ml.evaluate(shapes, [sample, sample], max_new_tokens=1)
    with pytest.raises(ValueError, match="no metric 'accuracy'"):
        ml.evaluate(shapes, [sample], ["accuracy"])
    with pytest.raises(ValueError, match="'vqa_accuracy' does not fit"):
        ml.evaluate(shapes, [sample], ["vqa_accuracy"], max_new_tokens=1)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="scipy"):
        _ = evaluation(np.ones(3)).means
