"""Integrated gradients: they add up, and are what their definition says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.models import access


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    return list(ml.datasets.load("easy-vqa", limit=2, ask="both"))


def integrate(model: Any, samples: Any, steps: int, **options: Any) -> ml.ImportanceScores:
    options = {"progress": False, "batch_size": 2} | options
    return ml.integrated_gradients(model, samples, steps, **options)


def loss(logits: Tensor, batch: Any) -> Tensor:
    return logits[:, -1, 7] - logits[:, -1].float().logsumexp(-1)


def test_they_add_up(shapes: Any, samples: Any) -> None:
    """At special tokens the log-probability falls all at once, which takes more steps."""
    spoken = [ml.Sample(one.messages, f"{one.answers[0]} and more") for one in samples]
    scores = integrate(shapes, spoken, 64, modalities=["special", "image"])
    every = ~ml.NeuronSet.of([], shapes)
    off = [ml.Condition("special", every, at="special")]
    tried = ml.trials(shapes, spoken, [ml.Condition("intact"), *off], progress=False).logprob
    reached = scores.info["completeness"]
    lost = (tried[0] - tried[1]).mean()
    assert abs(lost) > 0.1
    assert reached["special"]["difference"] == pytest.approx(lost, abs=1e-4)
    for modality in scores.modalities:
        total = float(scores[modality].double().sum())
        assert total == pytest.approx(reached[modality]["sum"], rel=1e-4)
        assert reached[modality]["gap"] < 0.01
        assert 4 <= reached[modality]["steps"] <= 64


def test_their_definition(shapes: Any, samples: Any) -> None:
    """Gates on each neuron, and gradients with respect to them."""
    sample, hf_model = samples[0], shapes.original_model
    inputs = ml.inputs(shapes, sample.messages)
    ids = inputs.pop("input")
    image = access.layout(shapes).masks(ids)["image"][..., None]
    layers = access.mlps(shapes)
    nodes, weights = np.polynomial.legendre.leggauss(4)
    nodes, weights = (nodes + 1) / 2, weights / 2
    expected = torch.zeros(len(layers), layers[0].down.in_features)
    for node, weight in zip(nodes**3, weights * 3 * nodes**2, strict=True):
        gates = torch.full_like(expected, float(node)).requires_grad_(True)
        handles = [
            layer.activation.register_forward_hook(
                lambda _, __, x, gate=gate: torch.where(image, x * gate, x)
            )
            for layer, gate in zip(layers, gates, strict=True)
        ]
        with torch.enable_grad():
            loss(hf_model(input_ids=ids, **inputs).logits, None).sum().backward()
        for handle in handles:
            handle.remove()
        assert gates.grad is not None
        expected += float(weight) * gates.grad
    hf_model.zero_grad()
    scores = integrate(shapes, [sample], 4, modalities=["image"], objective=loss)
    assert scores.metrics == ("integrated",)
    torch.testing.assert_close(scores["image"][0], expected, atol=1e-6, rtol=1e-4)


def test_few_steps_are_warned_about_and_runs_continue(
    shapes: Any, samples: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"modalities": ["text"], "checkpoint": tmp_path}
    with pytest.warns(UserWarning, match="Give more steps"):
        one = integrate(shapes, samples, 4, **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert (names[0], names[1], len(names)) == ("all-1.000000", "text-0.000000", 6)
    with pytest.warns(UserWarning, match="Give more steps"):
        assert torch.equal(integrate(shapes, samples, 4, **options).values, one.values)
    assert one.select(0.01)["text"].means is None
    assert one.info["completeness"]["text"]["steps"] == 4


def test_what_cannot_be(shapes: Any, samples: Any) -> None:
    with pytest.raises(ValueError, match="steps must be at least 4"):
        integrate(shapes, samples, 0)
    with pytest.raises(TypeError, match="Give a list"):
        integrate(shapes, iter(samples), 4)
    with pytest.raises(ValueError, match="No sample has tokens of 'video'"):
        integrate(shapes, samples, 4, modalities=["video"])


def test_in_a_tower(shapes: Any, samples: Any) -> None:
    scores = integrate(shapes, samples[:1], 4, site="vision", objective=loss)
    reached = scores.info["completeness"]["image"]
    with ml.ablate(shapes, ~ml.NeuronSet.of([], shapes, "vision")):
        off = loss(shapes(**ml.inputs(shapes, samples[0].messages)), None)
    intact = loss(shapes(**ml.inputs(shapes, samples[0].messages)), None)
    assert reached["difference"] == pytest.approx(float(intact - off), abs=1e-4)
    assert scores.site == "vision"
