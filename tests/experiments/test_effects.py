"""Experiments read from tables of trials, whose answers are known here, and made on `shapes`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import miner_lens as ml
from miner_lens.experiments import necessity as curves
from miner_lens.experiments.asking import Asking
from miner_lens.experiments.plan import INTACT, Plan
from miner_lens.experiments.resampling import contrast, contrast_interval
from miner_lens.experiments.selection_grid import mixes

NAMES = ("text", "image")
LAYERS, NEURONS, SAMPLES = 3, 40, 30
# What really serves questions asked through each modality: the first neurons of a layer each.
TRUTH = {name: {(layer, n) for n in range(6)} for layer, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def scores() -> ml.ImportanceScores:
    """Scores that are highest at the neurons that serve a modality."""
    values = torch.rand(5, len(NAMES), LAYERS, NEURONS, generator=torch.manual_seed(0)) / 2
    for place, name in enumerate(NAMES):
        for layer, neuron in TRUTH[name]:
            values[:, place, layer, neuron] += 0.5
    return ml.ImportanceScores(values, NAMES, means=torch.zeros(len(NAMES), LAYERS, NEURONS))


def tried(plan: Plan, labels: tuple[str, ...] = NAMES) -> ml.Trials:
    """What a model would do that loses a nat with each neuron off that serves the question."""
    noise = np.random.default_rng(0).normal(size=len(labels) * SAMPLES) / 10
    rows = []
    for condition in plan.conditions:
        off: set[tuple[int, int]] = set()
        if isinstance(condition.neurons, ml.NeuronSet):
            off = set(~condition.neurons if condition.complement else condition.neurons)
        lost = np.repeat([len(off & TRUTH[label]) for label in labels], SAMPLES)
        rows.append(noise - lost - len(off) / 1000)
    logprob = np.array(rows)
    ids = tuple(f"q{n}/{label}" for label in labels for n in range(SAMPLES))
    names = tuple(condition.name for condition in plan.conditions)
    every = tuple(label for label in labels for _ in range(SAMPLES))
    return ml.Trials(ids, every, names, logprob > -1, logprob)


def cost(frame: pd.DataFrame, **about: Any) -> float:
    """The cost in nats of the row that these columns tell."""
    rows = frame[frame["measure"] == "logprob"]
    for name, value in about.items():
        rows = rows[rows[name] == value]
    return float(rows["cost"].item())


def kept(found: Any, path: Path) -> None:
    """It is the same after it has been in a file, and can be drawn."""
    found.save(path / "found.safetensors")
    again = type(found).load(path / "found.safetensors")
    pd.testing.assert_frame_equal(again.frame, found.frame)
    assert again.summary == found.summary
    assert again.figure()._repr_png_().startswith(b"\x89PNG")


def test_ablation_table(scores: ml.ImportanceScores, tmp_path: Path) -> None:
    plan = ml.experiments.ablation_plan(scores, ratio=0.1)
    found = ml.experiments.read_ablation(tried(plan), plan)
    assert cost(found.frame, label="image", off="image", kind="MSNs") == pytest.approx(6.006)
    assert cost(found.frame, label="image", off="text", kind="MSNs") == pytest.approx(0.006)
    assert cost(found.frame, label="text", off="all", kind="MSNs") == pytest.approx(6.012)
    assert cost(found.frame, label="text", off="all", kind="bottom") == pytest.approx(0.012)
    rest = found.frame[found.frame["kind"] == "complement"]
    assert set(rest["neurons"]) == {LAYERS * NEURONS - 12}
    assert cost(found.frame, label="text", kind="complement") == pytest.approx(0.108)
    sizes = found.frame[found.frame["off"] == "all"].groupby("kind")["neurons"].unique()
    for kind in ("MSNs", "random", "layer-matched", "bottom"):
        assert list(sizes[kind]) == [12]
    compared = found.comparisons
    assert len(compared) == 2 * 2 * 7
    assert (compared["p_holm"] >= compared["p"]).all()
    beyond = compared[compared["beyond_chance"] & (compared["measure"] == "logprob")]
    assert {(row.label, row.off) for row in beyond.itertuples()} == {
        (label, off) for label in NAMES for off in (label, "all")
    }
    assert "image against random on image" in found.summary
    assert "text against random on image" not in found.summary
    kept(found, tmp_path)


def test_equal_sets_are_tried_once(scores: ml.ImportanceScores) -> None:
    plan = ml.experiments.ablation_plan(scores, ratio=0.1)
    # Text and image have six neurons each, so their random controls are the same.
    assert plan.groups["random, text"] == plan.groups["random, image"]
    done = [(one.neurons, one.complement) for one in plan.conditions]
    assert len(done) == len(set(done))
    assert plan.conditions[0].name == INTACT
    named = {one.name for one in plan.conditions}
    assert {name for group in plan.groups.values() for name in group} <= named


def test_pairs_are_there_with_three_modalities() -> None:
    scores = ml.ImportanceScores(torch.rand(5, 3, 2, 60), ["text", "special", "image"])
    plan = ml.experiments.ablation_plan(scores, ratio=0.1, seeds=(0,))
    offs = [row.about["off"] for row in plan.rows if row.about["kind"] == "MSNs"]
    assert offs[3:] == ["text + special", "text + image", "special + image", "all"]


def test_ratio_sweep(scores: ml.ImportanceScores, tmp_path: Path) -> None:
    plan = ml.experiments.ratio_plan(scores, ratios=(0.001, 0.05, 0.1, 0.2))
    found = ml.experiments.read_ratios(tried(plan), plan)
    assert set(found.frame["ratio"]) == {0.0, 0.05, 0.1, 0.2}  # 0.1 % is less than a neuron
    for ratio, lost in ((0.05, 3), (0.1, 6), (0.2, 6)):
        assert cost(found.frame, label="text", ratio=ratio, off="text") == pytest.approx(
            lost, abs=0.03
        )
    assert "at 5.00%, 10.00%, 20.00% of 3 tried" in found.summary
    kept(found, tmp_path)
    with pytest.raises(ValueError, match="Give larger ratios"):
        ml.experiments.ratio_plan(scores, ratios=[0.001])


def test_selection_grid(scores: ml.ImportanceScores, tmp_path: Path) -> None:
    assert len(mixes()) == 10
    assert mixes()["0.25 mean + 0.25 max + 0.5 attn_k"] == {
        "mean": 0.25,
        "max": 0.25,
        "attn_k": 0.5,
    }
    assert mixes(["attribution"]) == {"attribution": {"attribution": 1.0}}
    plan = ml.experiments.grid_plan(scores, ratio=0.1, strategies=["LA_MU", "random"])
    found = ml.experiments.read_grid(tried(plan), plan)
    assert len(found.frame) == 2 * 2 * (1 + 2 * 10)
    assert found.info["distinct"] == len(plan.conditions) - 1 <= 11
    best = cost(found.frame, label="text", strategy="LA_MU", weights="mean")
    assert best == pytest.approx(6.012)
    kept(found, tmp_path)


def test_values(scores: ml.ImportanceScores, tmp_path: Path) -> None:
    plan = ml.experiments.value_plan(scores, ratio=0.1)
    found = ml.experiments.read_values(tried(plan), plan)
    assert len(plan.conditions) == 1 + 3 * (2 + 1 + 3)
    assert cost(found.frame, label="text", off="text", written="mean") == pytest.approx(6.006)
    kept(found, tmp_path)
    bare = ml.ImportanceScores(torch.rand(5, 2, 3, 40), NAMES)
    with pytest.raises(ValueError, match="needs mined means"):
        ml.experiments.value_plan(bare, ratio=0.1)


def test_specificity(scores: ml.ImportanceScores, tmp_path: Path) -> None:
    plan = ml.experiments.specificity_plan(scores, ratio=0.1)
    found = ml.experiments.read_specificity(tried(plan), plan)
    matrix = found.matrix()
    assert matrix.loc["image", "image"] == pytest.approx(6.006)
    assert matrix.loc["image", "text"] == pytest.approx(0.006)
    row = found.index.set_index("measure").loc["logprob"]
    assert row["index"] == pytest.approx(6 / 6.012)
    assert row["low"] == pytest.approx(row["index"])  # all questions lose the same
    assert row["questions"] == SAMPLES
    assert found.summary.endswith(f"over {SAMPLES} questions, specific.")
    kept(found, tmp_path)
    table = tried(plan)
    with pytest.raises(ValueError, match="at least two modalities"):
        ml.experiments.read_specificity(tried(plan, ("text",)), plan)
    with pytest.raises(ValueError, match="is asked twice"):
        ml.experiments.read_specificity(table, plan, lambda sample: "all the same")
    with pytest.raises(ValueError, match="share 0 questions"):
        ml.experiments.read_specificity(table, plan, lambda sample: sample)


@pytest.mark.parametrize(
    ("own", "other", "index"),
    [
        ([2.0, 4.0], [0.0, 0.0], 1.0),
        ([1.0, 1.0], [3.0, 3.0], -0.5),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3.0, 3.0], [-1.0, -1.0], 1.0),
        ([-0.5, -0.5], [2.0, 2.0], -1.0),
        ([-2.0, -2.0], [-1.0, -1.0], 0.0),
    ],
)
def test_index_by_the_definition(own: list[float], other: list[float], index: float) -> None:
    here, there = np.array(own), np.array(other)
    assert contrast(here, there) == index
    assert contrast_interval(here, there) == (index, index)


COSTS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12)


@given(own=COSTS, other=COSTS)
def test_index_stays_between_its_ends(own: list[float], other: list[float]) -> None:
    """Whatever the signs; the other way round it is the other sign; where both lose, the ratio."""
    here, there = np.array(own), np.array(other)
    found = float(contrast(here, there))
    assert -1 <= found <= 1
    assert found == -float(contrast(there, here))
    one, two = here.mean(), there.mean()
    if one > 0 and two > 0:
        assert found == pytest.approx((one - two) / (one + two))
    elif one > 0 or two > 0:
        assert found == (1 if one > 0 else -1)
    else:
        assert found == 0


@settings(max_examples=20, deadline=None)
@given(costs=st.lists(st.tuples(*[st.floats(-10, 10)] * 2), min_size=3, max_size=12))
def test_interval_of_the_index_stays_between_its_ends(costs: list[tuple[float, float]]) -> None:
    low, high = contrast_interval(*np.array(costs).T, resamples=50)
    assert -1 <= low <= high <= 1


def test_interval_of_the_index_covers_the_truth() -> None:
    """95 % of intervals, give or take what 200 of them may miss by chance."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        own, other = draw.gamma(2, 1.5, 40), draw.gamma(2, 0.5, 40)  # means 3 and 1
        low, high = contrast_interval(own, other, resamples=400)
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_transfer(scores: ml.ImportanceScores, tmp_path: Path) -> None:
    flat = ml.ImportanceScores(scores.values.flip(2), NAMES)  # of neurons that serve nothing
    mined = {"one": scores, "other": flat}
    plan = ml.experiments.transfer_plan(mined, "text", ratio=0.1)
    found = ml.experiments.read_transfer(tried(plan), plan)
    assert found.matrix().loc["one", "text"] == pytest.approx(6.006)
    assert found.matrix().loc["other", "text"] == pytest.approx(0.006)
    assert found.info["jaccard"] == [{"one": "one", "other": "other", "jaccard": 0.0}]
    kept(found, tmp_path)
    with pytest.raises(ValueError, match="at least two data sets"):
        ml.experiments.transfer_plan({"one": scores})
    with pytest.raises(KeyError, match="smell"):
        ml.experiments.transfer_plan(mined, "smell")


def test_necessity(scores: ml.ImportanceScores, tmp_path: Path) -> None:
    fractions = (0.0, 0.05, 0.5, 1.0)
    plan = ml.experiments.necessity_plan(scores, ["text"], fractions, seeds=(0,))
    found = ml.experiments.read_necessity(tried(plan), plan)
    by_text = found.frame[found.frame["ranking"] == "text"]
    lost = [
        cost(by_text, label="text", curve="deletion", fraction=fraction) for fraction in fractions
    ]
    assert lost == pytest.approx([0, 6.006, 6.06, 6.12])
    gone = [
        cost(by_text, label="text", curve="insertion", fraction=fraction) for fraction in fractions
    ]
    assert gone == pytest.approx([6.12, 0.114, 0.06, 0])
    areas = found.areas.set_index(["label", "measure", "curve", "ranking"])
    curve = by_text.query("label == 'text' and measure == 'logprob' and curve == 'deletion'")
    naive = np.trapezoid(curve["value"], curve["fraction"])
    assert areas.loc[("text", "logprob", "deletion", "text"), "area"] == pytest.approx(naive)
    assert areas.loc[("text", "logprob", "deletion", "text"), "difference_high"] < 0
    assert areas.loc[("text", "logprob", "insertion", "text"), "difference_low"] > 0
    kept(found, tmp_path)
    with pytest.raises(ValueError, match="rise from 0 to 1"):
        ml.experiments.necessity_plan(scores, fractions=(0.0, 0.5))
    with pytest.raises(ValueError, match="no scores of 'smell'"):
        ml.experiments.necessity_plan(scores, ["smell"])


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_area_is_between_the_extremes(values: list[float]) -> None:
    fractions = list(np.linspace(0, 1, len(values)))
    found = float(curves.__globals__["area"](np.array([values]), fractions)[0])
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9


def test_a_table_of_another_plan(scores: ml.ImportanceScores) -> None:
    plan = ml.experiments.specificity_plan(scores, ratio=0.1)
    other = ml.experiments.ratio_plan(scores, ratios=[0.1])
    with pytest.raises(ValueError, match="There is no condition"):
        ml.experiments.read_ratios(tried(plan), other)


@pytest.fixture(scope="module")
def mined(shapes: Any) -> tuple[ml.ImportanceScores, dict[str, Any]]:
    data = {ask: ml.datasets.load("easy-vqa", limit=16, ask=ask) for ask in NAMES}
    both = [sample for some in data.values() for sample in some[:8]]
    found = ml.mine(shapes, both, batch_size=8, progress=False)
    return found, {ask: some[8:] for ask, some in data.items()}


SMALL: dict[str, Callable[..., Any]] = {
    "ablation_table": lambda *args, **how: ml.experiments.ablation_table(*args, seeds=(0,), **how),
    "ratio_sweep": lambda *args, **how: ml.experiments.ratio_sweep(
        *args, ratios=(0.02, 0.2), seeds=(0,), **how
    ),
    "selection_grid": lambda *args, **how: ml.experiments.selection_grid(
        *args, strategies=["LA_MU"], **how
    ),
    "ablation_values": lambda *args, **how: ml.experiments.ablation_values(
        *args, seeds=(0,), **how
    ),
    "specificity": lambda *args, **how: ml.experiments.specificity(*args, seeds=(0,), **how),
    "necessity": lambda *args, **how: ml.experiments.necessity(
        *args, modalities=["image"], fractions=(0.0, 0.1, 1.0), seeds=(0,), **how
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_on_a_model(
    shapes: Any, mined: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, data = mined
    found = SMALL[name](shapes, data, scores, progress=False, checkpoint=tmp_path / "kept")
    assert set(found.frame["label"]) == set(NAMES)
    # The same from what was kept, without a pass.
    monkeypatch.setattr(Asking, "run", lambda *_: pytest.fail("a pass"))
    again = SMALL[name](shapes, data, scores, progress=False, checkpoint=tmp_path / "kept")
    pd.testing.assert_frame_equal(again.frame, found.frame)
    kept(found, tmp_path)


def test_transfer_on_a_model(shapes: Any, mined: Any) -> None:
    _, data = mined
    halves = {ask: ml.mine(shapes, some[:4], progress=False) for ask, some in data.items()}
    with pytest.raises(KeyError, match="image"):
        ml.experiments.transfer(shapes, data, halves, "image", progress=False)
    found = ml.experiments.transfer(
        shapes, {ask: some[4:] for ask, some in data.items()}, halves, seeds=(0,), progress=False
    )
    assert found.matrix().shape == (3, 2)
