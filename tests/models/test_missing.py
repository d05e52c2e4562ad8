"""What is said of a model that lacks something, and what can be done with it all the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import miner_lens as ml
from miner_lens.models import sites
from miner_lens.models.access import layout
from miner_lens.models.description import describe
from miner_lens.models.structure import plain
from tests import towers
from tests.models.test_families import logits
from tests.parts import FAMILIES
from tests.towers import TEXT

IDS = {"input_ids": torch.arange(3, 12)[None]}
TEXTS = [(IDS, {"text": IDS["input_ids"] != 0})]


@pytest.fixture(scope="module")
def phi() -> Any:
    """Gate and up are one projection."""
    torch.manual_seed(0)
    return ml.wrap(Phi3ForCausalLM(Phi3Config(**TEXT)).eval())


def test_metrics_without_attention() -> None:
    inputs = towers.vision_inputs()
    bridge = ml.wrap(towers.vision_model())
    for site in ("llm", "vision"):
        data = [(inputs, {"prompt": inputs["attention_mask"].bool()})]
        full = ml.mine(bridge, data, site=site, progress=False)
        part = ml.mine(bridge, data, site=site, metrics=("prob", "mean", "max"), progress=False)
        # Other hooks, other kernels: bits may differ.
        torch.testing.assert_close(part.values[:3], full.values[:3], atol=1e-6, rtol=0)
        assert not part.values[3:].any()
        assert full.values[3:].any()


@pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")
def test_fused_gate_and_up(phi: Any) -> None:
    """X is what the activation function makes of the gate's half."""
    scores = ml.mine(phi, TEXTS, metrics=("prob", "mean", "max"), progress=False)
    model = phi.original_model
    seen: list[torch.Tensor] = []

    def split(mlp: Any, args: Any, kwargs: Any) -> None:
        gate, _ = mlp.gate_up_proj(args[0]).chunk(2, -1)
        seen.append(silu(gate[0]))

    blocks = [block.mlp.original_component for block in phi.blocks]
    handles = [
        phi.blocks[n].mlp.register_forward_pre_hook(
            lambda m, a, k, mlp=mlp: split(mlp, a, k), with_kwargs=True
        )
        for n, mlp in enumerate(blocks)
    ]
    intact = logits(model, IDS)
    for handle in handles:
        handle.remove()
    means = torch.stack([x.mean(0) for x in seen])
    torch.testing.assert_close(scores.means[0], means, atol=1e-6, rtol=0)
    neurons = ml.NeuronSet([(0, 3), (1, 5), (1, 47)], layers=2, neurons=48)
    with ml.ablate(phi, neurons):
        ablated = logits(model, IDS)
    with torch.no_grad(), phi.hooks(fwd_hooks=ml.ablation_hooks(phi, neurons)):
        torch.testing.assert_close(logits(model, IDS), ablated, atol=1e-6, rtol=0)
    with torch.no_grad():
        for layer, neuron in neurons:
            model.model.layers[layer].mlp.down_proj.weight[:, neuron] = 0
    torch.testing.assert_close(logits(model, IDS), ablated, atol=1e-5, rtol=0)
    assert not torch.allclose(intact, ablated)


class Outside(nn.Module):
    """Attention that transformers' interface does not compute: each token takes in those before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        count = torch.arange(1, 1 + hidden_states.shape[-2])[:, None]
        return self.mix(hidden_states.cumsum(-2) / count), None


class OutsideForCausalLM(LlamaForCausalLM):
    """A model that TransformerLens has no adapter for."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = Outside(config.hidden_size)


def test_a_decoder_with_attention_outside_the_interface() -> None:
    torch.manual_seed(0)
    model = OutsideForCausalLM(LlamaConfig(**TEXT)).eval()
    before = logits(model, IDS)
    bridge = ml.wrap(model)
    assert torch.equal(logits(bridge, IDS), before)
    with pytest.raises(RuntimeError, match="queries and keys after RoPE cannot be read"):
        ml.mine(bridge, TEXTS, progress=False)
    scores = ml.mine(bridge, TEXTS, metrics=("prob", "mean", "max"), progress=False)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        plain(layer.mlp).act_fn.register_forward_hook(lambda m, a, x: seen.append(x[0].mean(0)))
    logits(model, IDS)
    torch.testing.assert_close(scores.means[0], torch.stack(seen), atol=1e-6, rtol=0)
    with ml.ablate(bridge, ml.NeuronSet([(0, 3), (1, 5)], layers=2, neurons=48)):
        assert not torch.allclose(logits(bridge, IDS), before)
    found = str(describe(bridge))
    assert "missing: llm: queries and keys after RoPE cannot be read" in found
    assert "rebuilds" not in found


def test_a_tower_with_attention_outside_the_interface() -> None:
    model, inputs = FAMILIES["internvl"].make()
    for layer in model.model.vision_tower.encoder.layer:
        layer.attention = Outside(20)
    bridge = ml.wrap(model)
    data = [(inputs, {"prompt": inputs["attention_mask"].bool()})]
    with pytest.raises(RuntimeError, match="queries and keys after RoPE cannot be read"):
        ml.mine(bridge, data, site="vision", progress=False)
    metrics = ("prob", "mean", "max")
    scores = ml.mine(bridge, data, site="vision", metrics=metrics, progress=False)
    assert scores.values.amax() == pytest.approx(2 / 3)  # one sample of three has no image
    assert ml.mine(bridge, data, site="projector", progress=False).values.any()
    assert "missing: vision: queries and keys after RoPE cannot be read" in str(describe(bridge))


def test_a_decoder_without_hookable_activations() -> None:
    model, inputs = towers.vision_model(), towers.vision_inputs()
    for layer in model.model.language_model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = silu
    before = logits(model, inputs)
    bridge = ml.wrap(model)
    assert torch.equal(logits(model, inputs), before)
    data = [(inputs, {"prompt": inputs["attention_mask"].bool()})]
    with pytest.raises(ValueError, match=r"Layer 0 .* calls its activation function as function"):
        ml.mine(bridge, data, progress=False)
    assert ml.mine(bridge, data, site="vision", progress=False).values.any()
    found = describe(bridge)
    assert [site.name for site in found.sites] == ["vision", "projector"]
    assert "missing: llm: Layer 0" in str(found)


def test_a_tower_without_hookable_activations() -> None:
    model = towers.vision_model()
    for block in model.model.visual.blocks:
        del block.mlp.act
        block.mlp.act = gelu
    bridge = ml.wrap(model)
    assert list(sites.sites(model)) == ["llm", "projector"]
    with pytest.raises(ValueError, match="known in llm, projector"):
        ml.mine(bridge, TEXTS, site="vision", progress=False)


def test_experts_without_hookable_activations() -> None:
    """X is told from what gate and up make together."""
    model = MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=2)).eval()
    means = ml.mine(ml.wrap(copy.deepcopy(model)), TEXTS, progress=False).means
    for layer in model.model.layers:
        del layer.mlp.experts.act_fn
        layer.mlp.experts.act_fn = silu
    torch.testing.assert_close(ml.mine(ml.wrap(model), TEXTS, progress=False).means, means)


def test_experts_of_no_product() -> None:
    model = MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=2)).eval()
    for layer in model.model.layers:
        experts = layer.mlp.experts
        own = {"_apply_gate": lambda self, both: both.chunk(2, -1)[0] + both.chunk(2, -1)[1].exp()}
        experts.__class__ = type("Sums", (type(experts),), own)
    bridge = ml.wrap(model)
    with pytest.raises(ValueError, match=r"no gated MLP .* but experts that transformers'"):
        ml.mine(bridge, TEXTS, progress=False)
    assert "missing: llm: Layer 0" in str(describe(bridge))


def test_an_unknown_placeholder(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = ml.wrap(towers.vision_model())
    monkeypatch.setattr("miner_lens.models.modality.media_tokens", lambda config: {})
    assert "missing: modalities: No modality layout is known" in str(describe(bridge))
    with pytest.raises(ValueError, match=r"No modality layout is known for Qwen2VL.*prepared"):
        layout(bridge)
    inputs = towers.vision_inputs()
    data = [(inputs, {"prompt": inputs["attention_mask"].bool()})]
    assert ml.mine(bridge, data, progress=False).values.any()


def test_descriptions() -> None:
    bridge = ml.wrap(towers.audio_model())
    found = describe(bridge)
    assert found.media == {"audio": towers.AUDIO}
    (llm, audio) = found.sites
    assert (llm.layers, llm.neurons, audio.layers, audio.neurons) == (2, 48, 3, 40)
    assert llm.modalities == ("text", "special", "audio")
    points = {point.format(i=1) for site in found.sites for point in (site.x, *site.attention)}
    assert points <= set(bridge.hook_dict)
    assert len(points) == 6
    assert "missing: projector" in str(found)
    with pytest.raises(ValueError, match="TransformerBridge is needed"):
        describe(towers.audio_model())
