"""Which edits make another model of a model, and which do not."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import miner_lens as ml
from miner_lens.models.access import identity
from miner_lens.models.fingerprint import SAMPLES, VERSION, fingerprint
from miner_lens.models.identity import ModelIdentity
from tests.quantized import by_bitsandbytes, by_quanto, by_torch, by_torchao
from tests.towers import pack, vision_inputs, vision_model


def edit(name: str, where: Any) -> Callable[[Any], None]:
    def edited(model: Any) -> None:
        model.get_parameter(name).data[where] += 1

    return edited


LAYER = "model.language_model.layers.3."
EDITS = {
    "a column of q": edit(LAYER + "self_attn.q_proj.weight", (slice(None), 5)),
    "a row of v": edit(LAYER + "self_attn.v_proj.weight", 7),
    "a row of o": edit(LAYER + "self_attn.o_proj.weight", 30),
    "a neuron's gate": edit(LAYER + "mlp.gate_proj.weight", 200),
    "a neuron's up": edit(LAYER + "mlp.up_proj.weight", 201),
    "a neuron's down": edit(LAYER + "mlp.down_proj.weight", (slice(None), 202)),
    "a norm": edit(LAYER + "input_layernorm.weight", 3),
    "a token": edit("model.language_model.embed_tokens.weight", 17),
    "the tower": edit("model.visual.blocks.1.attn.qkv.weight", (slice(None), 11)),
    "the patches": edit("model.visual.patch_embed.proj.weight", 9),
}


@pytest.mark.parametrize("what", EDITS)
def test_edited_weights_are_another_model(shapes: Any, what: str) -> None:
    model = plain_shapes()
    before = {site: identity(model, site) for site in ("llm", "vision", "projector")}
    assert before["llm"] == identity(shapes)
    EDITS[what](model)
    for site, one in before.items():
        with pytest.raises(ValueError, match=r"weights .* of the same shape"):
            one.check(identity(model, site))


@pytest.mark.parametrize(
    "shape", [(5, 5), (3, 8), (8, 3), (7, 2, 2), (9,), (40, 2), (0, 4), (), (2 * SAMPLES + 3, 2)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_it_reads_the_diagonal_wrapped_around(shape: tuple[int, ...], turned: bool) -> None:
    """Every element by itself, as the definition says."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = weight.mT if turned and weight.ndim == 2 else weight
    model: Any = nn.Module()
    model.config = SimpleNamespace()
    model.weight = nn.Parameter(weight)
    rows, columns = (*weight.shape[:1], 1)[0], math.prod(weight.shape[1:])
    longer = max(rows, columns) if weight.numel() else 0
    matrix = weight.reshape(rows, columns)
    read = [matrix[k % rows, k % columns] for k in range(0, longer, 1 + longer // SAMPLES)]
    number = torch.tensor(read, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert fingerprint(model) == f"{VERSION}:{hashlib.sha256(number).hexdigest()[:16]}"


def plain_shapes() -> Any:
    return AutoModelForImageTextToText.from_pretrained(ml.organisms.path("shapes")).eval()


@pytest.mark.parametrize("what", ["one neuron", "all but two of each layer"])
def test_baked_models_are_others(shapes: Any, tmp_path: Path, what: str) -> None:
    neurons = ml.NeuronSet.of([(4, 9)], shapes)
    if what != "one neuron":
        neurons = ~ml.NeuronSet.of([(n, two) for n in range(6) for two in (0, 192)], shapes)
    path = ml.bake(shapes, neurons, tmp_path / "baked")
    assert identity(ml.load(path, device="cpu")) != identity(shapes)


def test_bridges_and_dtypes_leave_the_model_the_same(shapes: Any) -> None:
    model = vision_model()
    before = identity(model)
    assert identity(copy.deepcopy(model).to(torch.bfloat16)) == before
    assert identity(ml.wrap(model)) == before
    assert identity(plain_shapes()) == identity(shapes)


def test_quantized_models_are_compared_by_shape() -> None:
    model, before = vision_model(), identity(vision_model())
    model.config.quantization_config = {"quant_method": "gptq"}
    assert identity(model).fingerprint is None
    model = vision_model()
    down = model.get_decoder().layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    assert identity(model).fingerprint is None
    pack(model := vision_model())
    assert identity(model).fingerprint is None
    model = vision_model()
    del model.get_decoder().layers[0].mlp.gate_proj.weight  # GPTQ and AWQ call theirs qweight
    found = identity(model)
    assert found.fingerprint is None
    before.check(found)


QUANTIZE = [by_torch, by_torchao, by_quanto, by_bitsandbytes]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_quantized_models_are_ablated_and_mined(quantize: Callable[[Any], Any]) -> None:
    inputs = vision_inputs()
    neurons = ml.NeuronSet.of([(0, 3), (1, 40)], vision_model())
    model = quantize(vision_model())
    assert identity(model).fingerprint is None
    with torch.no_grad():
        intact = model(**inputs).logits
        with ml.ablate(model, neurons):
            ablated = model(**inputs).logits
        assert not torch.equal(intact, ablated)
        bridge = ml.wrap(model)
        assert identity(bridge) == identity(model)
        assert torch.equal(bridge.original_model(**inputs).logits, intact)
        with ml.ablate(bridge, neurons):
            assert torch.equal(bridge.original_model(**inputs).logits, ablated)
    masks = {"text": inputs["input_ids"] > 0}
    for site in ("llm", "vision"):
        assert ml.mine(bridge, [(inputs, masks)], progress=False, site=site).values.any()


def adapted(target: str, trained: bool = True) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[target], r=4, init_lora_weights=not trained)
    return peft.get_peft_model(vision_model(), config).eval()


@pytest.mark.parametrize(
    "target", ["q_proj", "gate_proj", "up_proj", "down_proj", "fc2", "embed_tokens", "qkv"]
)
def test_active_adapters_are_another_model(target: str) -> None:
    before = identity(vision_model())
    assert identity(adapted(target, trained=False)) == before
    model = adapted(target)
    other = identity(model)
    assert other != before
    assert identity(ml.wrap(copy.deepcopy(model))) == other
    with model.disable_adapter():
        assert identity(model) == before
    assert identity(model) == other
    model.merge_adapter()
    assert identity(model) not in (before, other)
    model.unmerge_adapter()
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3)
    assert identity(model) not in (before, other)


def test_layers_trained_whole_are_another_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=4)
    model = peft.get_peft_model(vision_model(), config).eval()
    before = identity(vision_model())
    assert identity(model) == before
    model.get_output_embeddings().modules_to_save["default"].weight.data[5] += 1
    assert identity(model) != before


def test_fingerprints_of_older_files_are_not_compared(shapes: Any) -> None:
    now = identity(shapes)
    assert now.fingerprint is not None
    assert now.fingerprint.startswith(f"{VERSION}:")
    old = ModelIdentity.from_dict({**now.to_dict(), "fingerprint": "0123456789abcdef"})
    with pytest.warns(UserWarning, match=r"different versions of miner-lens.*Mine again"):
        old.check(now)
    with pytest.raises(ValueError, match="layers"):
        ModelIdentity.from_dict({**old.to_dict(), "layers": 7}).check(now)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        now.check(now)
