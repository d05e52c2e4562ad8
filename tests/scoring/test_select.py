from __future__ import annotations

import json
import math
from collections import Counter
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miner_lens import installed
from miner_lens.scoring import select
from miner_lens.scoring.scores import ImportanceScores
from tests.reference import load

few = settings(max_examples=20, deadline=None)
scores_ = st.builds(
    lambda seed, m, n: torch.rand(m, 3, n, generator=torch.Generator().manual_seed(seed)),
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(20, 40),
)


@pytest.mark.parametrize("number", range(4))
def test_reference(number: int) -> None:
    data = load(f"select_{number}.npz")
    names = [str(name) for name in data["modalities"]]
    scores = ImportanceScores(torch.tensor(data["ism"]), names)
    split = {"special_text": "special_text_as_one", "prompt": "prompt"}.get(
        names[0], "special_text_separate"
    )
    for i, case in enumerate(json.loads(str(data["cases"]))):
        chosen = scores.select(case["ratio"], case["strategy"], case["weights"], split)
        assert list(chosen) == names
        for name in names:
            expected = [tuple(pair) for pair in data[f"case{i}_{name}"].tolist()]
            assert list(chosen[name]) == sorted(expected), (case, name)


@few
@given(scores_, st.floats(0.2, 1.0))
def test_sizes(scores: torch.Tensor, ratio: float) -> None:
    modalities, layers, neurons = scores.shape
    k = int(ratio * (layers * neurons))
    chosen = {name: select.select(scores, ratio, name) for name in select.STRATEGIES}
    assert chosen["adaptive"].sum() == k
    assert chosen["adaptive"].sum(0).max() == 1
    assert chosen["LA_MU"].sum((1, 2)).tolist() == [k // modalities] * modalities
    assert chosen["LU_MA"].sum((0, 2)).tolist() == [k // layers] * layers
    assert (chosen["uniform"].sum(2) == k // (modalities * layers)).all()
    assert chosen["random"].shape == (1, layers, neurons)
    assert chosen["random"].sum() == k


@few
@given(scores_, st.floats(0.2, 1.0))
def test_contrastive_is_its_definition(scores: torch.Tensor, ratio: float) -> None:
    modalities, layers, neurons = scores.shape
    margins = scores.clone()
    for one in range(modalities):
        for other in range(modalities):
            if other != one:
                margins[one] = torch.minimum(margins[one], scores[one] - scores[other])
    chosen = select.select(scores, ratio, "contrastive")
    each = int(ratio * (layers * neurons)) // modalities
    assert chosen.sum((1, 2)).tolist() == [each] * modalities
    if modalities == 1:
        assert torch.equal(chosen, select.select(scores, ratio, "LA_MU"))
        return
    for mask, margin in zip(chosen, margins, strict=True):
        if mask.any() and not mask.all():
            assert margin[mask].min() >= margin[~mask].max()


def test_contrastive_passes_over_what_is_merely_strong() -> None:
    scores = torch.tensor([[[0.99, 0.60, 0.10, 0.00]], [[0.98, 0.10, 0.50, 0.00]]])
    assert select.select(scores, 0.5, "LA_MU")[:, 0, 0].all()
    assert select.select(scores, 0.5, "contrastive").nonzero().tolist() == [[0, 0, 1], [1, 0, 2]]


@few
@given(scores_, st.floats(0.05, 0.6), st.booleans())
def test_lape_is_its_definition(scores: torch.Tensor, ratio: float, signed: bool) -> None:
    scores = scores - 0.5 if signed else scores
    modalities, layers, neurons = scores.shape
    k = int(ratio * (layers * neurons))
    positive = scores.clamp(min=0).double()
    bar = positive.flatten().sort().values[max(1, round(0.95 * positive.numel())) - 1]
    ranked = []
    for layer in range(layers):
        for neuron in range(neurons):
            column = positive[:, layer, neuron]
            if ((column >= bar) & (column > 0)).any():
                shares = [float(v / column.sum()) for v in column if v > 0]
                ranked.append((-sum(p * math.log(p) for p in shares), layer, neuron))
    expected = torch.zeros_like(scores, dtype=torch.bool)
    for _, layer, neuron in sorted(ranked)[:k]:
        column = positive[:, layer, neuron]
        expected[:, layer, neuron] = (column >= bar) & (column > 0)
    chosen = select.select(scores, ratio, "lape")
    if modalities > 1:  # of one modality all entropies are 0, up to rounding
        assert torch.equal(chosen, expected)
    assert chosen.any(0).sum() <= k


@pytest.mark.parametrize("strategy", ["contrastive", "lape"])
def test_modalities_are_compared_where_they_occur(strategy: str) -> None:
    values = torch.rand(5, 2, 3, 50)
    often = ImportanceScores(values, ("text", "image"), samples=8)
    diluted = values * torch.tensor([1.0, 0.25])[:, None, None]  # absent from 6 samples of 8
    rarely = ImportanceScores(diluted, ("text", "image"), samples=8, occurrences=(8, 2))
    assert rarely.select(0.2, strategy) == often.select(0.2, strategy)
    assert rarely.select(0.2, "adaptive") != often.select(0.2, "adaptive")  # as published
    both = ImportanceScores.mean([often, often])  # which know no shares
    assert both.occurrences == (16, 16)
    assert both.select(0.2, strategy) == often.select(0.2, strategy)


def two_best(scores: torch.Tensor, k: int) -> torch.Tensor:
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[:, 0, :2] = True
    return chosen


def no_masks(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores


def test_strategies_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("two_best", f"{__name__}:two_best", select.ENTRY_POINTS),
        EntryPoint("wrong", f"{__name__}:no_masks", select.ENTRY_POINTS),
    ]
    monkeypatch.setattr(installed, "entry_points", lambda group: entries)
    scores = ImportanceScores(torch.rand(5, 2, 3, 50), ["text", "image"])
    chosen = scores.select(0.1, "two_best")
    assert list(chosen["image"]) == [(0, 0), (0, 1)]
    with pytest.raises(ValueError, match=r"'wrong' returned torch\.float32 of shape \[2, 3, 50\]"):
        scores.select(0.1, "wrong")
    with pytest.raises(
        ValueError, match=r"no strategy 'best'; there are .*, lape, two_best, wrong"
    ):
        scores.select(0.1, "best")


@few
@given(scores_)
def test_the_best_are_chosen(scores: torch.Tensor) -> None:
    chosen = select.select(scores, 0.3, "LA_MU")
    for mask, modality in zip(chosen, scores, strict=True):
        assert modality[mask].min() >= modality[~mask].max()


def test_ties_take_the_lowest_index() -> None:
    scores = torch.ones(2, 3, 1000)
    assert select.select(scores, 0.1, "adaptive")[0].flatten()[:300].all()
    assert select.select(scores, 0.1, "LA_MU")[:, 0, :150].all()
    assert select.select(scores, 0.1, "LU_MA")[0, :, :100].all()
    assert select.select(scores, 0.1, "uniform")[:, :, :50].all()


def test_random_is_seeded_and_without_replacement() -> None:
    every, few = torch.ones(4, 50, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    first = select.random(every, 20, seed=3)
    assert torch.equal(first, select.random(every, 20, seed=3))
    assert not torch.equal(first, select.random(every, 20, seed=4))
    assert first.sum() == 20
    assert select.random(every, 200).all()
    counts = Counter(select.random(few, 1, seed).flatten().nonzero().item() for seed in range(200))
    assert len(counts) == 10
    every[0, 7:] = False
    assert torch.equal(select.random(every, int(every.sum())), every)


def test_weights_as_a_mapping() -> None:
    values = torch.rand(5, 2, 3, 4)
    by_name = select.combine(values, {"mean": 0.25, "max": 0.25, "attn_k": 0.5})
    assert torch.equal(by_name, select.combine(values))
    torch.testing.assert_close(by_name, (values[1] + values[2]) / 4 + values[3] / 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, 2.0), r"Got 2 weights for 5 metrics \(prob, mean"),
        ((0.0,) * 5, "not all 0"),
        ((-1.0, 0.0, 0.0, 0.0, 2.0), "0 or more"),
        ((float("nan"), 1.0, 1.0, 1.0, 1.0), "finite"),
        ({"median": 1.0}, "no metric median; there are prob, mean"),
        ({}, "not all 0"),
    ],
)
def test_bad_weights(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select.combine(torch.rand(5, 1, 1, 4), weights)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers(bad: float) -> None:
    values = torch.rand(5, 2, 3, 4)
    values[3, 1, 2, 0] = bad
    with pytest.raises(ValueError, match="attn_k, modality 1, layer 2, neuron 0"):
        select.combine(values)
    with pytest.raises(ValueError, match="modality image"):
        ImportanceScores(values, ("text", "image")).select(0.5)
    assert select.combine(values, {"prob": 1.0}).isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("strategy", select.STRATEGIES)
def test_ratio_out_of_range(ratio: float, strategy: str) -> None:
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\].*got"):
        select.select(torch.rand(2, 3, 50), ratio, strategy)


@pytest.mark.parametrize(
    ("strategy", "least", "each"),
    [
        ("adaptive", 1, "one"),
        ("LA_MU", 2, "one for each of 2 modalities"),
        ("LU_MA", 3, "one for each of 3 layers"),
        ("uniform", 6, "one for each of 2 modalities x 3 layers"),
        ("random", 1, "one"),
        ("contrastive", 2, "one for each of 2 modalities"),
        ("lape", 1, "one"),
    ],
)
def test_ratio_too_small(strategy: str, least: int, each: str) -> None:
    scores = torch.rand(2, 3, 70)
    with pytest.raises(ValueError, match=f"at least {least}, {each}") as caught:
        select.select(scores, 0.9 * least / 210, strategy)
    smallest = float(str(caught.value).rstrip(".").split()[-1])
    assert select.select(scores, smallest, strategy).sum() >= least


@few
@given(st.integers(1, 40), st.integers(10, 20_000), st.integers(1, 5))
def test_the_smallest_ratio_named_works(layers: int, neurons: int, modalities: int) -> None:
    with pytest.raises(ValueError, match="smallest ratio") as caught:
        select.budget(1e-9, "uniform", modalities, layers, neurons)
    smallest = float(str(caught.value).rstrip(".").split()[-1])
    assert select.budget(smallest, "uniform", modalities, layers, neurons) >= modalities * layers


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match="no strategy 'best'; there are adaptive, LA_MU, LU_MA"):
        select.select(torch.rand(2, 3, 50), 0.1, "best")
