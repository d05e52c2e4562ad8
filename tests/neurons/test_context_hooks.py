"""An ablation that writes nothing says so, and one that is over is over in copies too."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import miner_lens as ml
from miner_lens.models.access import mlps
from tests.models.test_inside import llama_model, text_inputs
from tests.towers import vision_inputs, vision_model


def logits(model: Any, inputs: dict[str, Any] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs or text_inputs()).logits


def most(model: Any, site: str = "llm") -> ml.NeuronSet:
    return ~ml.NeuronSet.of([(0, 1)], model, site)


def remove_hooks(model: nn.Module) -> None:
    """As pyvene does when it cleans up."""
    for module in model.modules():
        module._forward_hooks = OrderedDict()
        module._forward_pre_hooks = OrderedDict()


@pytest.mark.parametrize("before", [True, False])
def test_removed_hooks(before: bool) -> None:
    model = llama_model()
    says = "Passes after that were not ablated" if before else "Nothing was ablated"

    def ablated() -> None:
        with ml.ablate(model, most(model)):
            if before:
                logits(model)
            remove_hooks(model)
            logits(model)

    with pytest.warns(UserWarning, match=rf"removed while it was open.*{says}") as found:
        ablated()
    assert [warning.filename for warning in found] == [__file__]


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def by_layer(model: Any) -> Any:
    for layer in model.get_decoder().layers:
        layer.mlp.compile(backend="eager")
    return model


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="eager"),
    "in place": in_place,
    "by layer": by_layer,
}


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_code_that_passes_hooks_by(how: str) -> None:
    model = llama_model()
    neurons = most(model)
    with ml.ablate(model, neurons):
        expected = logits(model)
    compiled = COMPILED[how](model)
    intact = logits(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ml.ablate(compiled, neurons):
            assert torch.equal(logits(compiled), expected)
    with pytest.warns(UserWarning, match="(?i)compiled code"):  # noqa: SIM117
        with ml.ablate(compiled, neurons), torch.compiler.set_stance("default"):
            assert torch.equal(logits(compiled), intact)
    with pytest.warns(UserWarning, match="set_stance"), ml.ablate(in_place(model), neurons):
        pass


def test_fused_kernels_that_call_no_activation_function() -> None:
    model = llama_model()
    for layer in model.get_decoder().layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(
            nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        )
    with pytest.warns(UserWarning, match="not called"), ml.ablate(model, most(model)):
        logits(model)


def test_what_may_write_nothing() -> None:
    """No model was run, no neurons are given, or no image passed through the tower."""
    model, words = vision_model(), {"input_ids": torch.arange(3, 9)[None]}
    none = ml.NeuronSet([], layers=2, neurons=48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ml.ablate(model, most(model)):
            pass
        with ml.ablate(model, none):
            logits(model, words)
        with ml.ablate(model, most(model, "vision")):
            logits(model, words)
        with ml.ablate(model, most(model), at="image"):
            logits(model, words)
        bridge = ml.wrap(vision_model())
        last = ml.NeuronSet.of([(1, 0)], bridge)
        with ml.ablate(bridge, last):
            bridge(words["input_ids"], stop_at_layer=1)
        with contextlib.suppress(KeyError), ml.ablate(model, most(model)):
            remove_hooks(model)
            raise KeyError


def test_a_tower_that_ran_past_its_hooks() -> None:
    model = vision_model()
    activation = mlps(model, "vision")[0].activation
    neurons = ml.NeuronSet.of([(0, 1)], model, "vision")
    block = model.model.visual.blocks[0].mlp
    block.forward = lambda x: block.fc2(activation.forward(block.fc1(x)))
    with pytest.warns(UserWarning, match="not called"), ml.ablate(model, neurons):
        logits(model, vision_inputs())


def test_weights_on_meta_are_refused() -> None:
    with torch.device("meta"):
        model = llama_model()
    with pytest.raises(ValueError, match="layer 0 are on the meta device"):
        ml.ablate(model, ml.NeuronSet([(0, 1)], layers=2, neurons=48)).__enter__()
    bridge = ml.wrap(model)
    with pytest.raises(ValueError, match="meta device"):
        ml.ablation_hooks(bridge, ml.NeuronSet([(1, 1)], layers=2, neurons=48))


@pytest.mark.parametrize("whole_layers", [True, False])
def test_offloaded_weights_are_not_refused(whole_layers: bool) -> None:
    import accelerate

    model = llama_model()
    neurons = most(model)
    with ml.ablate(model, neurons):
        expected = logits(model)
    classes = ["LlamaMLP"] if whole_layers else None
    offloaded = accelerate.cpu_offload(model, preload_module_classes=classes)
    assert mlps(offloaded)[0].before.weight.is_meta
    with ml.ablate(offloaded, neurons):
        assert torch.equal(logits(offloaded), expected)


OPTIONS: list[dict[str, Any]] = [{}, {"value": "min"}, {"at": "image"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_copy_made_inside_is_intact(options: dict[str, Any], wrapped: bool) -> None:
    plain, inputs = vision_model(), vision_inputs()
    model = ml.wrap(plain) if wrapped else plain
    intact = logits(plain, inputs)
    with ml.ablate(model, most(model), **options):
        ablated = logits(plain, inputs)
        copied = copy.deepcopy(model)
        plain_copy = copied.original_model if wrapped else copied
        assert torch.equal(logits(plain_copy, inputs), intact)
        assert torch.equal(logits(plain, inputs), ablated)
        with ml.ablate(copied, most(copied), **options):
            assert torch.equal(logits(plain_copy, inputs), ablated)
    assert not torch.equal(ablated, intact)
    assert torch.equal(logits(plain_copy, inputs), intact)
    assert torch.equal(logits(plain, inputs), intact)


def test_a_copy_of_a_tower_is_intact() -> None:
    model, inputs = vision_model(), vision_inputs()
    intact = logits(model, inputs)
    with ml.ablate(model, most(model, "vision"), "min"):
        ablated = logits(model, inputs)
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied, inputs), intact)
        assert torch.equal(logits(model, inputs), ablated)
    assert not torch.equal(ablated, intact)


def test_a_model_saved_whole_inside_is_intact() -> None:
    model, file = llama_model(), io.BytesIO()
    intact = logits(model)
    with ml.ablate(model, most(model)):
        torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), intact)
