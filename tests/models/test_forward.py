"""Fewer logits are those of a whole pass, and leave the rest of the pass as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.models.forward import evaluating, last_logits
from tests import families
from tests.families import build
from tests.models.test_families import generated, logits
from tests.parts import FAMILIES
from tests.towers import TEXT

pytestmark = pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")
IDS = {"input_ids": torch.arange(3, 15)[None]}


def capped() -> families.Made:
    """Its logits go through a soft cap behind the head."""
    more = {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 64}
    return build("Gemma2ForCausalLM", **TEXT | more), IDS


def sharing(name: str = "Gemma4ForCausalLM") -> families.Made:
    """Its last two layers take keys and values of earlier ones."""
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    shared = {"num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 8}
    embedded = {"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8}
    return build(name, **TEXT | layers | shared | embedded, sliding_window=64), IDS


MADE = {
    name: FAMILIES[name].make for name in ("qwen2_vl", "qwen2_audio", "gemma4", "phi4_multimodal")
}


@pytest.mark.parametrize(
    "make", [*MADE.values(), capped, sharing], ids=[*MADE, "capped", "sharing"]
)
@pytest.mark.parametrize("count", [1, 3])
def test_last_logits_are_those_of_the_whole_pass(make: Any, count: int) -> None:
    model, inputs = make()
    bridge = ml.wrap(model)
    with evaluating(bridge):
        whole = logits(bridge, inputs)
        with last_logits(model, count):
            some = logits(bridge, inputs)
        assert torch.equal(logits(bridge, inputs), whole)
    assert some.shape[1] == count
    torch.testing.assert_close(some, whole[:, -count:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_asking_for_fewer_logits_shortens_no_layer(count: int) -> None:
    model, inputs = sharing()
    bridge, seen = ml.wrap(model), []
    points = [f"blocks.{layer}.mlp.act.hook_out" for layer in range(4)]
    hooks = [(point, lambda x, hook: seen.append(x)) for point in points]
    whole = logits(bridge, inputs)
    with bridge.hooks(fwd_hooks=hooks), torch.no_grad():
        some = model(**inputs, logits_to_keep=count).logits
    assert [x.shape[1] for x in seen] == [12] * 4
    assert some.shape[1] == count
    torch.testing.assert_close(some, whole[:, -count:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_last_layers_are_mined_at_all_positions(batch_size: int) -> None:
    model, _ = sharing()
    ids = IDS["input_ids"].repeat(batch_size, 1)
    x: list[Tensor] = []
    handles = [
        layer.mlp.act_fn.register_forward_hook(lambda module, args, out: x.append(out))
        for layer in model.model.layers
    ]
    logits(model, {"input_ids": ids})
    for handle in handles:
        handle.remove()
    bridge = ml.wrap(model)
    mask = torch.arange(12).repeat(batch_size, 1) < 6
    data = [({"input_ids": ids}, {"image": mask, "text": ~mask})]
    for metrics in (("prob", "mean", "max"), ("mean", "attn_k", "attn_q")):
        scores = ml.mine(bridge, data, metrics=metrics, progress=False)
        assert scores.means is not None
        for name, own in (("image", mask), ("text", ~mask)):
            expected = torch.stack([layer[own].mean(0) for layer in x])
            found = scores.means[scores.modalities.index(name)]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrapped", [True, False])
def test_generation_ablates_by_the_whole_prompt(wrapped: bool) -> None:
    """The smallest X of the prompt, in layers that plain generation computes at its end alone."""
    model, inputs = sharing()
    bridge = ml.wrap(model) if wrapped else model
    chosen = [(layer, neuron) for layer in range(4) for neuron in range(0, 48, 2)]
    neurons = ml.NeuronSet(chosen, layers=4, neurons=48)
    with ml.ablate(bridge, neurons, "min"):
        whole = logits(bridge, inputs)[:, -1]
        with torch.no_grad():
            last = model(**inputs, logits_to_keep=1).logits[:, -1]
        tokens = generated(bridge, inputs)
    torch.testing.assert_close(last, whole, atol=1e-5, rtol=0)
    assert tokens[0, 12] == whole.argmax()
