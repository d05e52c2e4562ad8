"""Planted neurons carry their modality's information, and no other neuron does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import miner_lens as ml
from miner_lens.organisms.planting import CASES, COLOURS, PLANTED


@pytest.mark.parametrize("case", CASES)
def test_what_was_planted_carries_the_information(case: str) -> None:
    planting = ml.organisms.planted(case, seed=3, samples=24)
    model = ml.wrap(planting.model, planting.processor)
    truth = {name: ml.NeuronSet.of(found, model) for name, found in planting.truth.items()}
    assert {len(found) for found in truth.values()} == {PLANTED}
    others = ~ml.NeuronSet.union(truth)
    conditions = [
        ml.Condition("intact"),
        *(ml.Condition(name, found) for name, found in truth.items()),
        ml.Condition("distractors", ml.NeuronSet.of(planting.distractors, model)),
        ml.Condition("all others", others),
    ]
    table = ml.trials(model, planting.data, conditions, progress=False).to_frame()
    groups = dict(list(table.groupby(["condition", "label"])))
    for label in ("image", "text"):
        for condition in ("intact", "distractors", "all others"):
            assert groups[condition, label]["correct"].all(), condition
            assert groups[condition, label]["logprob"].min() > -0.1
        for condition in truth:
            found = groups[condition, label]
            if condition == label or case == "shared":
                # Nothing is left of the colour: all answers are as good as any, for all questions.
                assert found["logprob"].max() - found["logprob"].min() < 0.02
                assert found["logprob"].between(-2.3, -2.07).all()  # log 1/8 and a few other words
            else:
                assert found["correct"].all()
    if case != "shared":
        assert truth["image"].isdisjoint(truth["text"])
    assert not set(planting.distractors) & set(ml.NeuronSet.union(truth))


def activations(planting: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Mean X of the planted neurons and of the distractors, at each modality's tokens."""
    model = ml.wrap(planting.model, planting.processor)
    scores = ml.mine(model, planting.data, metrics=("mean",), batch_size=8, progress=False)
    assert scores.means is not None
    groups = {**planting.truth, "distractors": planting.distractors}
    return {
        name: {
            modality: torch.stack([scores.means[place][pair] for pair in pairs])
            for place, modality in enumerate(scores.modalities)
        }
        for name, pairs in groups.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_cases_are_what_they_say(case: str) -> None:
    seen = activations(ml.organisms.planted(case, seed=1, samples=16))
    image, strong = seen["image"], seen["distractors"]
    own, elsewhere = image["image"], image["text"]
    match case:
        case "strong":
            assert own.min() > strong["image"].max() - 1
            assert own.min() > strong["image"].median()
        case "plain" | "idle":
            assert 1.2 < own.min() <= own.max() < 3
            assert strong["image"].median() > own.max()
        case "rare":
            assert own.max() < 0.3 < strong["image"].median()
        case "weak":
            assert 0.05 < own.min() <= own.max() < 0.2
        case "shared":
            assert torch.equal(own, seen["text"]["image"])
            assert elsewhere.min() > 1.2
        case "flipped":
            assert own.max() < -0.25
    if case != "shared":
        assert elsewhere.abs().max() < 0.05
    idle = strong["image"] - strong["text"]
    assert (idle > 2).sum() >= (PLANTED if case == "idle" else 0)


def test_seeds_draw_everything_anew_and_repeat() -> None:
    one, same, other = (ml.organisms.planted("plain", seed, samples=4) for seed in (5, 5, 6))
    for a, b in zip(one.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.truth == same.truth
    assert one.truth != other.truth
    assert [row["id"] for row in one.data] == ["image-0", "text-1", "image-2", "text-3"]
    assert {row["answers"][0] for row in one.data} <= set(COLOURS)
    pictures = [row["messages"][0]["content"][0]["image"] for row in (one.data[0], same.data[0])]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    assert repr(one) == "Planting('plain', seed=5: 16 image, 16 text neurons planted)"


def test_it_answers_when_asked() -> None:
    planting = ml.organisms.planted("rare", samples=16)
    model = ml.wrap(planting.model, planting.processor)
    assert ml.accuracy(model, planting.data) == 1


def test_errors() -> None:
    with pytest.raises(ValueError, match="no case 'easy'; there are strong, plain, rare"):
        ml.organisms.planted("easy")
    with pytest.raises(ValueError, match="at least 1, not 0"):
        ml.organisms.planted(samples=0)
