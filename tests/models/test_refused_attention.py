"""Attention of which some metrics would be wrong: they are refused, and the others are right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import miner_lens as ml
from miner_lens.models.description import describe
from tests.families import build
from tests.models.test_families import logits
from tests.towers import TEXT

IDS = {"input_ids": torch.arange(3, 12)[None]}
TEXTS = [(IDS, {"text": IDS["input_ids"] != 0})]
WITHOUT_ATTENTION = ("prob", "mean", "max")

pytestmark = pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")


def hunyuan() -> Any:
    """Its queries and keys are normed after they are rotated."""
    return build("HunYuanDenseV1ForCausalLM", **TEXT | {"head_dim": 8})


def glm_dsa() -> Any:
    """Each token looks at the few keys that an indexer chooses for it."""
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
    index = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
    more = {"num_key_value_heads": 4, "v_head_dim": 8, "mlp_layer_types": ["dense", "dense"]}
    return build("GlmMoeDsaForCausalLM", **TEXT | ranks | index | more)


def linear(name: str) -> Any:
    """Every other layer has linear attention, without queries and keys that are multiplied."""
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 8}
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return build(name, **TEXT | kinds | heads | sizes)


def qwen3_5() -> Any:
    return linear("Qwen3_5ForCausalLM")


def olmo_hybrid() -> Any:
    return linear("OlmoHybridForCausalLM")


def means_of(model: Any) -> Tensor:
    """The mean of X of each layer, [layer neuron], in the plain model."""
    seen: list[Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(
            lambda mlp, args: seen.append(silu(mlp.gate_proj(args[0]))[0].mean(0))
        )
        for layer in model.model.layers
    ]
    logits(model, IDS)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("make", [hunyuan, glm_dsa, qwen3_5, olmo_hybrid])
def test_queries_and_keys_as_multiplied_are_out_of_reach(make: Any) -> None:
    model = make()
    before, means = logits(model, IDS), means_of(model)
    untouched = copy.deepcopy(model)
    bridge = ml.wrap(model)
    torch.testing.assert_close(logits(bridge, IDS), before, atol=1e-5, rtol=0)
    for metrics in (("attn_k",), ("attn_q",), ("attended",)):
        with pytest.raises(RuntimeError, match="queries and keys after RoPE cannot be read"):
            ml.mine(bridge, TEXTS, metrics=metrics, progress=False)
    scores = ml.mine(bridge, TEXTS, metrics=WITHOUT_ATTENTION, progress=False)
    assert scores.means is not None
    torch.testing.assert_close(scores.means[0], means, atol=1e-5, rtol=0)
    assert "missing: llm: queries and keys after RoPE cannot be read (layer" in str(
        describe(bridge)
    )
    neurons = ml.NeuronSet([(0, 3), (1, 5)], layers=len(means), neurons=means.shape[1])
    for layer, neuron in ((0, 3), (1, 5)):
        untouched.model.layers[layer].mlp.down_proj.weight.data[:, neuron] = 0
    with ml.ablate(bridge, neurons):
        off = logits(bridge, IDS)
    torch.testing.assert_close(off, logits(untouched, IDS), atol=1e-5, rtol=0)
