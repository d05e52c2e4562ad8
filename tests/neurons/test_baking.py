from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import miner_lens as ml
from miner_lens.models import access as models
from tests.analyzers.test_reference_model import logits, model_inputs
from tests.reference import load


def some(model: Any) -> ml.NeuronSet:
    who = models.identity(model)
    pairs = [(layer, neuron) for layer in (0, who.layers - 1) for neuron in range(0, 60, 3)]
    return ml.NeuronSet(pairs, layers=who.layers, neurons=who.neurons, identity=who)


def test_equals_ablation_by_zero(shapes: Any, tmp_path: Path) -> None:
    neurons = some(shapes)
    path = ml.bake(shapes, {"image": neurons}, tmp_path / "baked")
    plain = AutoModelForImageTextToText.from_pretrained(path).eval()
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    inputs = ml.inputs(shapes, sample.messages)
    with torch.no_grad():
        intact = shapes(**inputs)
        with ml.ablate(shapes, neurons):
            ablated = shapes(**inputs)
        theirs = plain(**{"input_ids": inputs.pop("input"), **inputs}).logits
    torch.testing.assert_close(theirs, ablated, atol=1e-5, rtol=0)
    assert not torch.allclose(theirs, intact, atol=1e-3)
    assert plain.config.tie_word_embeddings
    assert plain.generation_config.to_dict() == shapes.original_model.generation_config.to_dict()
    assert AutoProcessor.from_pretrained(path).chat_template == shapes.processor.chat_template
    assert ml.NeuronSet.load(path / "ablated_neurons.safetensors") == neurons
    again = ml.load(path, device="cpu")
    with ml.ablate(shapes, neurons):
        assert ml.generate(again, sample.messages, 4) == ml.generate(shapes, sample.messages, 4)


@pytest.mark.parametrize("wrapped", [True, False])
def test_nothing_else_changes(tiny: Any, tmp_path: Path, wrapped: bool) -> None:
    inputs = model_inputs(load("tiny_qwen2_vl/expected.npz"), 0)
    before = logits(tiny, inputs)
    nothing = ml.NeuronSet([], layers=3, neurons=96)
    path = ml.bake(tiny, nothing, tmp_path / "whole")
    plain = AutoModelForImageTextToText.from_pretrained(path).eval()
    if not wrapped:
        path = ml.bake(plain, nothing, tmp_path / "again")
        plain = AutoModelForImageTextToText.from_pretrained(path).eval()
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, before)
    assert torch.equal(logits(tiny, inputs), before)


def test_dtype_is_kept(tmp_path: Path) -> None:
    half = ml.load("shapes", device="cpu", dtype=torch.bfloat16)
    before = copy.deepcopy(vars(half.original_model.config))
    path = ml.bake(half, some(half), tmp_path)
    assert vars(half.original_model.config) == before
    assert half.original_model.config.dtype is torch.bfloat16
    assert AutoModelForImageTextToText.from_pretrained(path).dtype == torch.bfloat16


def test_refusals(tiny: Any, shapes: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers"):
        ml.bake(tiny, some(shapes), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        ml.bake(tiny, some(tiny), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
