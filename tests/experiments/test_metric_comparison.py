"""MINER's metrics against attribution: rankings, predictions and specificity, on `shapes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import miner_lens as ml
from miner_lens.experiments import MetricComparison, comparison_plan, metric_comparison

RATIO = 0.02


@pytest.fixture(scope="module")
def asked() -> dict[str, list[ml.Sample]]:
    return {ask: list(ml.datasets.load("easy-vqa", limit=14, ask=ask)) for ask in ("image", "text")}


@pytest.fixture(scope="module")
def known(shapes: Any, asked: Any) -> tuple[ml.ImportanceScores, ml.ImportanceScores]:
    first = [one for some in asked.values() for one in some[:8]]
    both = (ml.ImportanceAnalyzer(), ml.AttributionAnalyzer())
    return ml.run(shapes, first, *both, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def found(shapes: Any, asked: Any, known: Any) -> MetricComparison:
    held_out = {ask: some[8:] for ask, some in asked.items()}
    return metric_comparison(shapes, held_out, *known, ratio=RATIO, progress=False)


def test_agreement(known: Any, found: MetricComparison) -> None:
    scores, attribution = known
    table = found.agreement.set_index(["metric", "modality"])
    assert len(table) == 6 * 3
    assert table["neurons"].nunique() == 1
    assert table.loc["attribution"]["rank_correlation"].tolist() == pytest.approx([1, 1, 1])
    assert table.loc["attribution"]["overlap"].tolist() == [1, 1, 1]
    one, other = scores["image"][2].flatten(), attribution["image"][0].flatten()
    row = table.loc["max", "image"]
    assert row["rank_correlation"] == pytest.approx(stats.spearmanr(one, other).statistic)
    assert row["amount_correlation"] == pytest.approx(stats.spearmanr(one, other.abs()).statistic)
    count = int(row["neurons"])
    assert count == int(RATIO * one.numel()) // 3
    both = set(one.topk(count).indices.tolist()) & set(other.topk(count).indices.tolist())
    assert row["overlap"] == pytest.approx(len(both) / count)
    assert row["by_chance"] == pytest.approx(count / one.numel())


def test_predicted_and_measured(shapes: Any, asked: Any, known: Any, found: Any) -> None:
    image = known[0].select(RATIO, "LA_MU", {"mean": 1.0})["image"]
    samples = asked["image"][8:]
    effects = ml.attribute(shapes, samples, batch_size=4, progress=False)
    intact, off = ml.Condition("intact"), ml.Condition("off", image, at="image")
    table = ml.trials(shapes, samples, [intact, off], progress=False)
    lost = float((table.logprob[0] - table.logprob[1]).mean())
    rows = found.frame.query("metric == 'mean' and off == 'image' and label == 'image'")
    row = rows.query("at == 'image' and measure == 'logprob'").squeeze()
    assert row["cost"] == pytest.approx(lost, abs=1e-5)
    by_hand = effects["image"][0][image.mask].sum().item()
    assert row["predicted"] == pytest.approx(by_hand, abs=1e-4)
    everywhere = rows.query("at == 'everywhere' and measure == 'logprob'").squeeze()
    by_hand = effects["prompt"][0][image.mask].sum().item()
    assert everywhere["predicted"] == pytest.approx(by_hand, abs=1e-4)
    assert rows.query("measure == 'correct'")["predicted"].isna().all()
    # At image tokens nothing is lost where there is none.
    absent = found.frame.query("off == 'image' and label == 'text' and at == 'image'")
    assert (absent["cost"] == 0).all()
    assert found.predictions["sets"].unique().tolist() == [6]


def test_specificity(shapes: Any, asked: Any, known: Any, found: MetricComparison) -> None:
    held_out = {ask: some[8:] for ask, some in asked.items()}
    alone = ml.experiments.specificity(
        shapes, held_out, known[0], RATIO, weights={"max": 1.0}, seeds=(0,), progress=False
    )
    expected = alone.index.set_index("measure").loc["logprob", "index"]
    table = found.specificity.query("measure == 'logprob'").set_index("metric")
    assert table.loc["max", "index"] == pytest.approx(expected, abs=1e-4)
    assert list(table.index) == ["prob", "mean", "max", "attn_k", "attn_q", "attribution"]


def test_it_says_and_keeps_what_it_found(found: MetricComparison, tmp_path: Path) -> None:
    assert found.summary.count("specificity") == 6
    found.save(tmp_path / "found.safetensors")
    loaded = MetricComparison.load(tmp_path / "found.safetensors")
    assert loaded.summary == found.summary
    assert loaded.predictions.equals(found.predictions)
    assert len(found.figure().axes) == 2


def test_what_does_not_fit(known: Any) -> None:
    scores, attribution = known
    with pytest.raises(ValueError, match="no 'attribution': give what"):
        comparison_plan(scores, scores)
    other = ml.ImportanceScores(torch.rand(1, 2, 3, 4), ("text", "image"), metrics=("attribution",))
    with pytest.raises(ValueError, match="attribution of 3 x 4 neurons of site 'llm'"):
        comparison_plan(scores, other)
    assert len(comparison_plan(scores, attribution).rows) == 6 * 3 * 2
