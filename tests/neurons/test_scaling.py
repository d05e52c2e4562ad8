"""Neurons turned up and down, and sets side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import miner_lens as ml
from tests.analyzers.test_reference_model import logits, model_inputs
from tests.neurons.test_ablation import SOME, activations, neuron_set
from tests.reference import REFERENCE, load

pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no reference data")


@pytest.fixture(scope="module")
def bridge() -> Any:
    return ml.load(REFERENCE / "tiny_qwen2_vl", device="cpu")


@pytest.fixture
def inputs() -> dict[str, Any]:
    return model_inputs(load("tiny_qwen2_vl/expected.npz"), 0)


MANY = tuple((1, neuron) for neuron in range(70))  # most of a layer


@pytest.mark.parametrize("pairs", [SOME, MANY])
@pytest.mark.parametrize("at", [None, "image"])
def test_zero_is_ablate_bit_for_bit(bridge: Any, inputs: Any, pairs: Any, at: str | None) -> None:
    neurons = neuron_set(*pairs)
    with ml.ablate(bridge, neurons, at=at):
        off, seen = logits(bridge, inputs), activations(bridge, inputs)
    with ml.scale(bridge, neurons, by=0.0, at=at):
        assert torch.equal(logits(bridge, inputs), off)
        for ours, theirs in zip(activations(bridge, inputs), seen, strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))  # no minus zero


@pytest.mark.parametrize("pairs", [SOME, MANY])
def test_activations_are_multiplied(bridge: Any, inputs: Any, pairs: Any) -> None:
    neurons = neuron_set(*pairs)
    before, first = activations(bridge, inputs), min(layer for layer, _ in pairs)
    with ml.scale(bridge, neurons, by=2.5):
        scaled = activations(bridge, inputs)
    expected = torch.where(neurons.mask[first], before[first] * 2.5, before[first])
    assert torch.equal(scaled[first], expected)


def test_twice_the_weights(bridge: Any, inputs: Any) -> None:
    from tests.neurons.test_ablation import plain_model

    edited = plain_model()
    with torch.no_grad():
        for layer, neuron in SOME:
            edited.get_decoder().layers[layer].mlp.down_proj.weight[:, neuron] *= 2
        theirs = edited(**inputs).logits
    with ml.scale(bridge, neuron_set(*SOME), by=2.0):
        torch.testing.assert_close(logits(bridge, inputs), theirs, atol=1e-6, rtol=0)


def test_it_composes_and_leaves_no_trace(bridge: Any, inputs: Any) -> None:
    neurons = neuron_set(*SOME)
    before = logits(bridge, inputs)
    with ml.scale(bridge, neurons, by=1.0):
        assert torch.equal(logits(bridge, inputs), before)
    with ml.scale(bridge, neurons, by=6.0):
        six = logits(bridge, inputs)
    with ml.scale(bridge, neurons, by=2.0), ml.scale(bridge, neurons, by=3.0):
        bridge.reset_hooks()
        assert torch.equal(logits(bridge, inputs), six)
        with ml.ablate(bridge, neurons):
            off = logits(bridge, inputs)
    assert not torch.equal(six, before)
    with ml.ablate(bridge, neurons):
        assert torch.equal(logits(bridge, inputs), off)
    with pytest.raises(KeyError), ml.scale(bridge, neurons, by=2.0):
        raise KeyError
    assert torch.equal(logits(bridge, inputs), before)


@pytest.mark.parametrize("pairs", [SOME, MANY])
def test_gradients_pass(bridge: Any, inputs: Any, pairs: Any) -> None:
    """Gradients through a scaled neuron are scaled; against finite differences of `by`."""
    hf_model = bridge.original_model
    neurons = neuron_set(*pairs)
    embedded = hf_model.get_input_embeddings()(inputs["input_ids"]).detach()
    direction = torch.randn_like(embedded)

    def value(step: float) -> torch.Tensor:
        there = (embedded + step * direction).double().float().requires_grad_(True)
        handle = hf_model.get_input_embeddings().register_forward_hook(lambda *_: there.clone())
        try:
            with ml.scale(bridge, neurons, by=3.0):
                logits = hf_model(**inputs).logits
        finally:
            handle.remove()
        total = logits[0, -1].double().softmax(-1)[5].log()
        if step == 0:
            total.backward()
            assert there.grad is not None
            return (there.grad * direction).sum()
        return total.detach()

    slope = value(0.0)
    assert float((value(3e-3) - value(-3e-3)) / 6e-3) == pytest.approx(float(slope), rel=2e-2)


def test_in_a_tower(shapes: Any) -> None:
    sample = ml.datasets.load("easy-vqa", limit=1)[0]
    inputs = ml.inputs(shapes, sample.messages)
    neurons = ml.NeuronSet.of([(1, n) for n in range(30)], shapes, site="vision")
    before = shapes(**inputs)
    with ml.scale(shapes, neurons, by=3.0):
        assert not torch.equal(shapes(**inputs), before)
    assert torch.equal(shapes(**inputs), before)


@pytest.mark.parametrize("by", [float("nan"), float("inf"), "2"])
def test_by_is_a_finite_number(bridge: Any, by: Any) -> None:
    with (
        pytest.raises(ValueError, match="by must be a finite number"),
        ml.scale(bridge, neuron_set(*SOME), by=by),
    ):
        pass
