"""Overlap, layers and stability of selections: against counts by hand, and what chance gives."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import miner_lens as ml
from miner_lens.experiments.stability import expected_jaccard, jaccard

few = settings(max_examples=25, deadline=None)
LAYERS, NEURONS = 3, 12


def sets(seed: int, shares: tuple[float, ...]) -> dict[str, ml.NeuronSet]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: ml.NeuronSet.from_mask(torch.rand(LAYERS, NEURONS, generator=generator) < share)
        for name, share in zip(("text", "image", "audio"), shares, strict=False)
    }


@few
@given(st.integers(0, 2**31), st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_overlap_counts_each_neuron_once(seed: int, shares: list[float]) -> None:
    chosen = sets(seed, tuple(shares))
    found = ml.experiments.overlap(chosen)
    for row in found.frame.to_dict("records"):
        inside = row["combination"].split(" & ")
        assert row["sets"] == len(inside)
        by_hand = [
            neuron
            for neuron in range(NEURONS)
            if [name for name in chosen if (row["layer"], neuron) in chosen[name]] == inside
        ]
        assert row["neurons"] == len(by_hand)
    assert found.frame["neurons"].sum() == len(ml.NeuronSet.union(chosen))
    # Expected: neurons in no set are the rest, so that all of a layer are accounted for.
    for layer, rows in found.frame.groupby("layer"):
        none = np.prod([1 - c.counts()[layer] / NEURONS for c in chosen.values()]) * NEURONS
        assert rows["expected"].sum() + none == pytest.approx(NEURONS)


def test_expected_overlap_is_that_of_random_sets() -> None:
    chosen = sets(1, (0.5, 0.3, 0.7))
    expected = {name: value for name, (_, value) in ml.experiments.overlap(chosen).totals.items()}
    total = dict.fromkeys(expected, 0.0)
    for seed in range(300):
        drawn = {
            name: ml.NeuronSet.random_like(one, seed=1000 * place + seed)
            for place, (name, one) in enumerate(chosen.items())
        }
        for name, (count, _) in ml.experiments.overlap(drawn).totals.items():
            total[name] += count / 300
    assert total == pytest.approx(expected, abs=0.4)


def test_layers() -> None:
    chosen = sets(2, (0.5, 0.3)) | {"audio": ml.NeuronSet([], layers=LAYERS, neurons=NEURONS)}
    found = ml.experiments.layer_distribution(chosen)
    table = found.frame.set_index(["modality", "layer"])
    for name, one in chosen.items():
        assert table.loc[name, "neurons"].tolist() == one.counts()
        assert table.loc[name, "share"].sum() == pytest.approx(1 if len(one) else 0)
    assert (table["even"] == 1 / LAYERS).all()
    centre = np.mean([layer for layer, _ in chosen["text"]])
    assert f"text lies at layer {centre:.1f} on average" in found.summary
    assert "audio has none" in found.summary


@few
@given(st.integers(0, 12), st.integers(0, 12), st.integers(12, 30))
def test_expected_jaccard_is_that_of_random_sets(one: int, other: int, total: int) -> None:
    if total > 14:  # of few neurons by counting all sets
        expected = expected_jaccard(one, other, total)
        assert 0 <= expected <= 1
        assert expected == pytest.approx(expected_jaccard(other, one, total))
        return
    one, other = min(one, 3), min(other, 3)
    first = set(range(one))
    values = [
        len(first & set(second)) / len(first | set(second)) if one + other else 1.0
        for second in combinations(range(total), other)
    ]
    assert expected_jaccard(one, other, total) == pytest.approx(np.mean(values))


def test_jaccard_of_large_sets() -> None:
    assert expected_jaccard(3000, 3000, 500_000) == pytest.approx(0.006 / 1.994, rel=1e-2)
    assert expected_jaccard(5, 5, 5) == 1
    with pytest.raises(ValueError, match="6 and 2 neurons do not fit into 5"):
        expected_jaccard(6, 2, 5)
    none = ml.NeuronSet([], layers=1, neurons=5)
    assert jaccard(none, none) == 1


def parts(count: int, noise: float, modalities: tuple[str, ...] = ("text", "image")) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(5, len(modalities), LAYERS, NEURONS, generator=generator)
    return [
        ml.ImportanceScores(
            truth + noise * torch.rand(truth.shape, generator=generator), modalities, samples=10
        )
        for _ in range(count)
    ]


def test_stability_of_what_does_not_change_and_of_noise() -> None:
    same = ml.experiments.stability(parts(4, noise=0), ratio=0.2, repeats=3)
    assert (same.frame["jaccard"] == 1).all()
    noisy = ml.experiments.stability(parts(4, noise=1000), ratio=0.2, repeats=40)
    halves = noisy.frame[noisy.frame["kind"] == "halves"]
    assert abs(halves["jaccard"].mean() - halves["chance"].mean()) < 0.1
    assert set(halves["samples"]) == {20}
    first = noisy.frame[noisy.frame["kind"] == "first samples"]
    assert first["samples"].tolist() == [10, 10, 20, 20, 30, 30]


def test_stability_is_that_of_the_selections() -> None:
    some = parts(3, noise=0.5)
    found = ml.experiments.stability(some, ratio=0.3, strategy="contrastive", repeats=1, seed=3)
    whole = sum(some).select(0.3, "contrastive")
    first = (some[0] + some[1]).select(0.3, "contrastive")
    rows = found.frame.query("kind == 'first samples' and samples == 20").set_index("modality")
    for name in ("text", "image"):
        own = len(whole[name] & first[name]) / len(whole[name] | first[name])
        assert rows.loc[name, "jaccard"] == own
        size = len(whole[name])
        chance = expected_jaccard(size, size, LAYERS * NEURONS)
        assert rows.loc[name, "chance"] == pytest.approx(chance)
    again = ml.experiments.stability(some, ratio=0.3, strategy="contrastive", repeats=1, seed=3)
    pd.testing.assert_frame_equal(again.frame, found.frame)


def test_stability_across_data_sets() -> None:
    """Halves of one and of another, against the definition; and modalities that both have."""
    one = parts(4, noise=0.5)
    flipped = [ml.ImportanceScores(s.values.flip(-1), s.modalities, samples=5) for s in one[:2]]
    found = ml.experiments.stability({"a": one, "b": flipped}, ratio=0.2, repeats=3, seed=1)
    draw = np.random.default_rng(1)
    between = found.frame[found.frame["kind"] == "data sets"]
    for _, again in between.groupby("repeat"):
        halves = []
        for some in (one, flipped):
            order = draw.permutation(len(some))
            half = [some[i] for i in order[: len(some) // 2]]
            halves.append(sum(half[1:], half[0]).select(0.2))
        rows = again.set_index("modality")
        assert set(rows["data"] + rows["other"]) == {"ab"}
        assert set(rows["samples"]) == {5}
        for name in ("text", "image"):
            left, right = (half[name] for half in halves)
            assert rows.loc[name, "jaccard"] == len(left & right) / len(left | right)
    within = found.frame.query("kind == 'halves' and data == 'a'")
    alone = ml.experiments.stability(one, ratio=0.2, repeats=3).frame.query("kind == 'halves'")
    assert within["chance"].tolist() == alone["chance"].tolist()
    table = found.matrix("text")
    mean = between[between["modality"] == "text"]["jaccard"].mean()
    assert table.loc["a", "b"] == table.loc["b", "a"] == pytest.approx(mean)
    assert table.loc["a", "a"] > table.loc["a", "b"]
    assert "text in a and b" in found.summary
    assert len(found.figure().axes) == 2
    with pytest.raises(KeyError, match="selected for 'smell'; there are text, image"):
        found.matrix("smell")
    other = [ml.ImportanceScores(s.values[:, :1], ("text",), samples=5) for s in one]
    narrow = ml.experiments.stability({"a": one, "b": other}, ratio=0.2, repeats=1)
    assert set(narrow.frame.query("kind == 'data sets'")["modality"]) == {"text"}
    sound = [ml.ImportanceScores(s.values[:, :1], ("audio",), samples=5) for s in one]
    with pytest.raises(ValueError, match="have no modality in common"):
        ml.experiments.stability({"a": one, "b": sound}, ratio=0.2, repeats=1)


def test_results_read_themselves(tmp_path: Path) -> None:
    chosen = sets(4, (0.5, 0.5))
    results = [
        ml.experiments.overlap(chosen),
        ml.experiments.layer_distribution(chosen),
        ml.experiments.stability(parts(4, noise=1), ratio=0.2, repeats=2),
        ml.experiments.stability({"a": parts(2, 1), "b": parts(2, 1)}, ratio=0.2, repeats=2),
    ]
    for found in results:
        found.save(tmp_path / "found")
        again = type(found).load(tmp_path / "found")
        pd.testing.assert_frame_equal(again.frame, found.frame)
        assert repr(again) == repr(found)
        assert found.figure().axes[0].has_data()
    both, expected = results[0].totals["text & image"]
    assert f"text & image {both} (by chance {expected:.1f})" in results[0].summary
    assert "2 splits" in results[2].summary


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least one set"):
        ml.experiments.overlap({})
    with pytest.raises(ValueError, match="at least two parts of the data; got 1"):
        ml.experiments.stability(parts(1, 0))
    with pytest.raises(ValueError, match="two parts of the data set 'b'; got 1"):
        ml.experiments.stability({"a": parts(2, 0), "b": parts(1, 0)})
    with pytest.raises(ValueError, match="mapping is empty"):
        ml.experiments.stability({})
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        ml.experiments.stability(parts(2, 0), repeats=0)
    with pytest.raises(ValueError, match="asks no samples"):
        ml.experiments.stability(parts(2, 0), strategy="random")
    one, other = parts(2, 0)
    other = ml.ImportanceScores(other.values, other.modalities, samples=10, occurrences=[10, 0])
    with pytest.raises(ValueError, match="a modality is in some parts alone"):
        ml.experiments.stability([other, one], ratio=0.2, repeats=1)
