from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import miner_lens as ml
from miner_lens.models import access as models
from tests.analyzers.test_reference_model import logits, model_inputs
from tests.quantized import by_bitsandbytes, by_quanto, by_torch, by_torchao
from tests.reference import load
from tests.towers import pack, vision_inputs, vision_model


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
    assert ml.NeuronSet.from_pretrained(path / "ablated_neurons") == neurons
    assert ml.NeuronSet.from_pretrained(path, subfolder="ablated_neurons") == neurons
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


def test_only_weights_lie_beside_weights(tiny: Any, tmp_path: Path) -> None:
    """Serving engines take every safetensors file of the folder for weights."""
    path = ml.bake(tiny, some(tiny), tmp_path / "baked")
    names: set[str] = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names |= set(weights.keys())
    unbaked = tmp_path / "unbaked"
    ml.unwrap(tiny).save_pretrained(unbaked)
    with safe_open(unbaked / "model.safetensors", "pt") as weights:
        assert names == set(weights.keys())


def test_card(tiny: Any, tmp_path: Path) -> None:
    tiny.original_model.config._name_or_path = "somebody/tiny"
    found = ModelCard.load(ml.bake(tiny, some(tiny), tmp_path / "baked") / "README.md")
    assert found.data.base_model == "somebody/tiny"
    assert found.data.library_name == "transformers"
    assert "modality-specific-neurons" in found.data.tags
    assert "40 of the 288 MLP neurons of its llm" in found.text
    assert "| 1 | 0 |" in found.text
    tiny.original_model.config._name_or_path = "/home/me/tiny"
    found = ModelCard.load(ml.bake(tiny, some(tiny), tmp_path / "again") / "README.md")
    assert found.data.base_model is None
    assert "/home/me" not in found.content


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**vision_inputs()).logits


def adapted(config: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(vision_model(), getattr(peft, config)(**options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoraConfig", {"target_modules": ["gate_proj", "down_proj", "fc1"]}),
        ("LoraConfig", {"target_modules": ["down_proj"], "use_dora": True}),
        ("IA3Config", {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}),
        ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    ],
)
def test_adapters_are_merged(config: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(config, **options)
    neurons = ml.NeuronSet([(0, 1), (1, 5), (1, 6)], layers=2, neurons=48)
    baked = AutoModelForImageTextToText.from_pretrained(ml.bake(model, neurons, tmp_path)).eval()
    assert not torch.allclose(logits_of(model), logits_of(vision_model()), atol=1e-3)
    with ml.ablate(model, neurons):
        torch.testing.assert_close(logits_of(baked), logits_of(model), atol=1e-4, rtol=0)


def test_adapters_that_are_no_weights(tmp_path: Path) -> None:
    neurons = ml.NeuronSet([(0, 1)], layers=2, neurons=48)
    prompts = adapted("PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"'default' \(PROMPT_TUNING\) changes no weights"):
        ml.bake(prompts, neurons, tmp_path / "prompts")
    options = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5]}
    lora = adapted("LoraConfig", target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=r"adapter of .*q_proj cannot be merged"):
        ml.bake(lora, neurons, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def by_type(model: Any) -> Any:
    pack(model)
    return model


def by_config(model: Any) -> Any:
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def by_dtype(model: Any) -> Any:
    down = model.get_decoder().layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    return model


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize(
    ("quantized", "method"),
    [
        (by_torch, "DynamicQuantizedLinear"),
        (by_torchao, "Int8Tensor"),
        (by_quanto, "WeightQBytesTensor"),
        (by_bitsandbytes, "bitsandbytes"),
        (by_type, "Packed"),
        (by_config, "gptq"),
        (by_dtype, "torch.int8"),
    ],
)
def test_quantized_weights_are_refused(quantized: Any, method: str, tmp_path: Path) -> None:
    neurons = ml.NeuronSet([(0, 1)], layers=2, neurons=48)
    with pytest.raises(ValueError, match=rf"quantized weights \({method}\).*use ml.ablate"):
        ml.bake(quantized(vision_model()), neurons, tmp_path / "baked")
    assert not list(tmp_path.iterdir())


def test_refusals(tiny: Any, shapes: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers"):
        ml.bake(tiny, some(shapes), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        ml.bake(tiny, some(tiny), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
