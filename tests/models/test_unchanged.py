"""A model in a bridge is what it was: its logits, its settings, and what it can see of itself."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import miner_lens as ml
from miner_lens.models import attention
from miner_lens.models.unchanged import short_logits
from tests import families
from tests.families import build
from tests.models.test_families import logits, pattern
from tests.models.test_inside import llama_model, shape_of
from tests.parts import FAMILIES
from tests.scoring.test_kernels import twin
from tests.towers import IMAGE, TEXT, vision_inputs, vision_model

IDS = {"input_ids": torch.arange(3, 19)[None]}


def minimax() -> Any:
    """Each token looks at a few blocks of keys, by a mask that it makes for eager and sdpa."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24}
    index = {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 2}
    index |= {"index_topk_blocks": 2, "index_local_blocks": 1}
    kinds = {"layer_types": ["minimax_m3_sparse"] * 2, "mlp_layer_types": ["sparse"] * 2}
    more = {"head_dim": 8, "rotary_dim": 8, "dense_intermediate_size": 48}
    return build("MiniMaxM3VLForCausalLM", **TEXT | experts | index | kinds | more)


def latent(name: str) -> Callable[[], Any]:
    """Each token looks at the few keys that an indexer chooses for it."""
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
    index = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
    more = {"num_key_value_heads": 4, "v_head_dim": 8, "first_k_dense_replace": 2}
    return lambda: build(name, **TEXT | ranks | index | more | {"n_group": 1, "topk_group": 1})


SPARSE = {
    "minimax_m3": minimax,
    "axk2": latent("AXK2ForCausalLM"),
    "deepseek_v32": latent("DeepseekV32ForCausalLM"),
    "dots3_note": latent("Dots3NoteForCausalLM"),
}


Call = tuple[Tensor, Tensor, float]


def attended(model: Any, inputs: families.Inputs, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Queries, keys and their scale as they reach the decoder's attention in the plain model."""
    seen: list[Call] = []
    decoder = model.get_decoder()
    holder = sys.modules[type(decoder).__module__]
    own = {"eager": holder.eager_attention_forward, "sdpa": sdpa_attention_forward}

    def spy(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        if type(module).__module__ == holder.__name__:
            seen.append((q, k, kwargs["scaling"]))
        return own[module.config._attn_implementation](module, q, k, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(holder, "eager_attention_forward", spy)
        patch.setitem(AttentionInterface._global_mapping, "sdpa", spy)
        logits(model, inputs)
    return seen


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_families_that_ask_for_their_attention_keep_it(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SPARSE[kind]()
    model.set_attn_implementation(name)
    expected, calls = logits(model, IDS), attended(model, IDS, monkeypatch)
    bridge = ml.wrap(model)
    assert model.config._attn_implementation == name
    seen: list[Tensor] = []
    points = [f"blocks.{n}.attn.hook_rot_{qk}" for n in range(2) for qk in "qk"]
    hooks = [(point, lambda x, hook: seen.append(x.transpose(1, 2))) for point in points]
    with bridge.hooks(fwd_hooks=hooks):
        assert torch.equal(logits(bridge, IDS), expected)
    theirs = [tensor for q, k, _ in calls for tensor in (q, k)]
    assert len(theirs) == 4
    assert all(map(torch.equal, seen, theirs))
    twin = SPARSE[kind]()  # beside it, in no bridge
    twin.set_attn_implementation(name)
    assert torch.equal(logits(twin, IDS), expected)
    assert torch.equal(logits(ml.unwrap(bridge), IDS), expected)


def test_hooks_fire_whatever_function_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that somebody has registered, which computes attention as it does."""
    calls: list[Any] = []

    def mine(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", mine)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", sdpa_mask)
    model, inputs = vision_model(), vision_inputs()
    expected, seen = logits(model, inputs), []
    bridge = ml.wrap(model)
    model.set_attn_implementation("mine")
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_rot_q", lambda q, hook: seen.append(q))]):
        assert torch.equal(logits(bridge, inputs), expected)
    assert len(seen) == 1
    assert calls


def test_towers_keep_their_attention() -> None:
    """TransformerLens computes the decoder's of this one, and wants eager masks for it."""
    model = families.llava()[0]
    bridge = ml.wrap(model)
    config = model.config
    assert [c._attn_implementation for c in (config.vision_config, config)] == ["sdpa", "sdpa"]
    assert config.text_config._attn_implementation == "eager"
    ml.unwrap(bridge)
    assert config.text_config._attn_implementation == "sdpa"


# Masks where TransformerLens computes attention.


def gemma3(**options: Any) -> Any:
    """TransformerLens sets eager attention in this one, and not in Llama."""
    return build("Gemma3ForCausalLM", **TEXT | {"head_dim": 8, "sliding_window": 64} | options)


def llama() -> Any:
    return build("LlamaForCausalLM", **TEXT)


def gpt2() -> Any:
    """Queries, keys and values are one projection."""
    return build("GPT2LMHeadModel", vocab_size=100, n_embd=32, n_layer=2, n_head=4)


def deepseek_v3() -> Any:
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
    more = {"num_key_value_heads": 4, "v_head_dim": 8, "first_k_dense_replace": 2}
    return build("DeepseekV3ForCausalLM", **TEXT | ranks | more | {"n_group": 1, "topk_group": 1})


PADDED = families.prompts([(5, 12)], [(6, 4), (7, 4)], [(8, 5)])
TEXT_MODELS = {"llama": llama, "gemma3": gemma3, "gpt2": gpt2, "deepseek_v3": deepseek_v3}
MEDIA_MODELS = ("llava", "llava_onevision", "gemma3", "mistral3")
REBUILT: dict[str, Callable[[], families.Made]] = {
    **{name: lambda make=make: (make(), PADDED) for name, make in TEXT_MODELS.items()},
    "windowed": lambda: (gemma3(sliding_window=3), PADDED),
    **{f"{name} with media": FAMILIES[name].make for name in MEDIA_MODELS},
}


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("make", REBUILT.values(), ids=REBUILT)
def test_padding_has_the_logits_that_it_had(make: Any, name: str) -> None:
    """With sdpa a token that sees nothing has no output of attention, with eager all values' mean.

    In a bridge, out of it and in a copy.
    """
    model, inputs = make()
    assert (inputs["attention_mask"] == 0).any()
    model.set_attn_implementation(name)
    expected = logits(model, inputs)
    bridge = ml.wrap(model)
    for one in (bridge, copy.deepcopy(bridge)):
        torch.testing.assert_close(logits(one, inputs), expected, atol=1e-5, rtol=0)
    assert torch.equal(logits(ml.unwrap(bridge), inputs), expected)


def test_attention_that_is_set_in_a_bridge_masks_as_it_does() -> None:
    model = llama()
    by_name = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        by_name[name] = logits(model, PADDED)
    assert not torch.allclose(by_name["sdpa"], by_name["eager"], atol=0.1)  # of padding
    bridge = ml.wrap(model)
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        torch.testing.assert_close(logits(bridge, PADDED), by_name[name], atol=1e-5, rtol=0)


def test_gradients_of_padding_are_numbers() -> None:
    for compatible in (False, True):
        bridge = ml.wrap(llama())
        if compatible:
            bridge.enable_compatibility_mode(no_processing=True)
        embedded = bridge.original_model.get_input_embeddings()(PADDED["input_ids"])
        embedded = embedded.detach().requires_grad_()
        mask = PADDED["attention_mask"]
        found = bridge.original_model(inputs_embeds=embedded, attention_mask=mask).logits
        found[mask == 1].sum().backward()
        assert found.isfinite().all()
        assert embedded.grad.isfinite().all()
        assert (embedded.grad[mask == 0] == 0).all()


def written(model: Any, inputs: families.Inputs) -> Any:
    """A greedy continuation, with a cache that has room for more than has been written."""
    options = {"cache_implementation": "static", "disable_compile": True, "do_sample": False}
    returned = {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(**inputs, **options, **returned, max_new_tokens=6, pad_token_id=0)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("make", TEXT_MODELS.values(), ids=TEXT_MODELS)
@pytest.mark.parametrize(
    "inputs",
    [IDS, IDS | {"attention_mask": torch.ones_like(IDS["input_ids"])}, PADDED],
    ids=["alone", "mask", "padded"],
)
def test_static_caches_are_no_longer_than_what_is_in_them(
    inputs: families.Inputs, make: Any, name: str
) -> None:
    model = make()
    model.set_attn_implementation(name)
    expected = written(model, inputs)
    ml.wrap(model)
    found = written(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)


def test_a_prompt_is_read_in_parts() -> None:
    """Each part sees those before it, with a cache that grows and with one that has room."""
    from transformers import DynamicCache, StaticCache

    model = llama()
    expected = logits(model, IDS)
    ml.wrap(model)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=40)):
        parts = [
            logits(model, {"input_ids": part, "past_key_values": cache})
            for part in IDS["input_ids"].split([5, 1, 10], dim=1)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=0)


# Soft caps and sinks, which fused attention has not.


def gemma2() -> families.Made:
    more = {"head_dim": 8, "attn_logit_softcapping": 5.0, "sliding_window": 64}
    return build("Gemma2ForCausalLM", **TEXT | more), IDS


def vaultgemma() -> families.Made:
    more = {"head_dim": 8, "attn_logit_softcapping": 5.0, "sliding_window": 64}
    return build("VaultGemmaForCausalLM", **TEXT | more), IDS


def flint() -> families.Made:
    return build("FlintForCausalLM", **TEXT), IDS


def paligemma2() -> families.Made:
    capped = {"head_dim": 8, "attn_logit_softcapping": 5.0, "sliding_window": 64}
    model = build(
        "PaliGemmaForConditionalGeneration",
        text_config=families.text("gemma2", **capped),
        vision_config=families.SIGLIP | {"projection_dim": 32},
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    inputs = families.pictures(4)
    return model, inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


@pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")
@pytest.mark.parametrize("make", [gemma2, vaultgemma, flint, paligemma2])
def test_what_has_no_fused_attention_is_mined_with_its_own(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P is softmax(QK^T) of the published procedure, without the cap or sinks that follow it."""
    model, inputs = make()
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    masks = {"text": real & (ids < 7), "special": real & (ids >= 7)}
    theirs = by_hand(model, inputs, masks, monkeypatch)
    expected, bridge = logits(model, inputs), ml.wrap(model)
    assert torch.equal(logits(bridge, inputs)[real], expected[real])
    free = ml.mine(bridge, [(inputs, masks)], metrics=("prob", "mean", "max"), progress=False)
    torch.testing.assert_close(free.values, theirs[:3], atol=1e-5, rtol=0)
    scores = ml.mine(bridge, [(inputs, masks)], progress=False)
    torch.testing.assert_close(scores.values, theirs, atol=1e-5, rtol=0)


def by_hand(
    model: Any, inputs: families.Inputs, masks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Scores by the definition, [metric modality layer neuron]."""
    found: list[Tensor] = []
    handles = [
        layer.mlp.act_fn.register_forward_hook(lambda module, args, x: found.append(x))
        for layer in model.get_decoder().layers
    ]
    calls = attended(model, inputs, monkeypatch)
    for handle in handles:
        handle.remove()
    scores = []
    for x, (q, k, scale) in zip(found, calls, strict=True):
        samples = []
        for row in range(len(x)):
            own = torch.stack([mask[row] for mask in masks.values()])
            real = own.any(0)
            p = pattern(q[row][:, real] * scale, k[row][:, real])
            samples.append(twin(x[row, real], p, own[:, real]))
        scores.append(torch.stack(samples).mean(0))
    return torch.stack(scores, 2).float()


# The comparison of logits.


def renaming(bridge: Any) -> None:
    """Have attention computed by a function of another name, so that sparse masks are left out."""
    AttentionInterface.register("renamed", sdpa_attention_forward)
    AttentionMaskInterface.register("renamed", sdpa_mask)
    bridge.original_model.config._attn_implementation = "renamed"


def test_a_bridge_that_changes_logits_is_refused_and_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = minimax()
    untouched, expected = copy.deepcopy(model), logits(model, IDS)
    logits(untouched, IDS)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "install", renaming)
        with pytest.raises(ValueError, match=r"gives other logits.*as it was.*check=False"):
            ml.wrap(model)
        assert shape_of(model) != shape_of(untouched)
        model.set_attn_implementation("sdpa")  # which is not undone by what knows nothing of it
    assert shape_of(model) == shape_of(untouched)
    assert torch.equal(logits(model, IDS), expected)
    ml.unwrap(ml.wrap(model))


def test_the_comparison_leaves_the_model_as_it_was() -> None:
    model = vision_model().train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert isinstance(short_logits(model), Tensor)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.model.rope_deltas is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_compared_is_wrapped_with_a_reason() -> None:
    with torch.device("meta"):
        meta = llama_model()
    with pytest.warns(UserWarning, match="not compared.*offloaded, or on the meta device"):
        ml.wrap(meta)
    querying = families.instructblip()[0]
    with pytest.warns(UserWarning, match="not compared.*does not run on token ids alone"):
        bridge = ml.wrap(querying)
    ml.unwrap(bridge)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.wrap(querying, check=False)


def test_offloaded_weights_are_not_fetched() -> None:
    from accelerate import cpu_offload

    model = llama_model()
    expected = logits(model, IDS)
    cpu_offload(model, torch.device("cpu"))
    with pytest.warns(UserWarning, match="not compared.*offloaded"):
        bridge = ml.wrap(model)
    torch.testing.assert_close(logits(bridge, IDS), expected, atol=1e-5, rtol=0)


def test_loading_compares_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miner_lens.models.bridge.difference", lambda before, after: (0.5, 0.0))
    with pytest.raises(ValueError, match="differ by 50"):
        ml.load("shapes", device="cpu")
    ml.load("shapes", device="cpu", check=False)


def test_encoder_decoders_run_on_tokens() -> None:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1}
    model = build("T5ForConditionalGeneration", **sizes, num_heads=4)
    found = short_logits(model)
    assert isinstance(found, Tensor)
    assert found.shape[-1] == 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    """TransformerLens computes this one's attention, in float32 within."""
    model: Any = llama_model()
    assert ml.wrap(model.to(dtype)) is not None
