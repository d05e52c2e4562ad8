"""Attention is cut at the same tokens however a prompt is padded, fed and cached.

The reference is the plain model on one whole prompt, with a mask made by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import miner_lens as ml
from miner_lens.models.modality import ModalityLayout
from tests.families import build
from tests.towers import IMAGE, TEXT

SLIDING = {"sliding_window": 6, "head_dim": 8}
MIXED = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", SLIDING),
    "gemma3": ("Gemma3ForCausalLM", MIXED),
    "llama4": (
        "Llama4ForCausalLM",
        {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}
        | {"interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    ),
}
PROMPT = [5, IMAGE, IMAGE, 6, 7, IMAGE, 8, 9, IMAGE, 10, 11]
OTHER = [3, IMAGE, 4, 5, IMAGE, 7, 8]
NEW = 8  # past both windows


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any) -> Any:
    name, more = FAMILIES[request.param]
    built = build(name, **TEXT | more)
    built.modality_layout = ModalityLayout({"image": IMAGE}, frozenset())
    return built


def by_hand(model: Any, ids: list[int], last: int, layers: Any = (0, 1), prompt: int = 0) -> Tensor:
    """Logits of the plain model, [position token], where the last tokens see no image."""
    config, length = model.config, len(ids)
    at = torch.arange(length)
    causal = at <= at[:, None]
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if getattr(config, "sliding_window", None) is None and "chunked_attention" not in kinds:
        kinds = ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or length
    chunk = getattr(config, "attention_chunk_size", None) or length
    allowed = {
        "full_attention": causal,
        "sliding_attention": causal & (at > at[:, None] - window),
        "chunked_attention": causal & (at // chunk == at[:, None] // chunk),
    }
    image = torch.tensor(ids) == IMAGE
    image[prompt or length :] = False
    cut = (at[:, None] >= length - last) & image & (at != at[:, None])

    def mask(layer: int) -> Any:
        def set_it(module: Any, args: Any, kwargs: Any) -> Any:
            seen = allowed[kinds[layer]]
            seen = seen & ~cut if layer in layers else seen
            added = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float).min)
            return args, kwargs | {"attention_mask": added[None, None]}

        return set_it

    handles = [
        block.self_attn.register_forward_pre_hook(mask(layer), with_kwargs=True)
        for layer, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def batch(side: str) -> dict[str, Tensor]:
    rows = [PROMPT, OTHER]
    missing = [len(PROMPT) - len(row) for row in rows]
    padded = [
        [0] * gap + row if side == "left" else row + [0] * gap
        for gap, row in zip(missing, rows, strict=True)
    ]
    ids = torch.tensor(padded)
    mask = (ids != 0).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": mask.cumsum(1).sub(1).clamp(0),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side(model: Any, side: str, last: int, attention: str) -> None:
    inputs = batch(side)
    own = model.config._attn_implementation
    model.set_attn_implementation(attention)
    with torch.no_grad(), ml.knockout(model, "image", layers=[1], last=last):
        logits = model(**inputs).logits
    model.set_attn_implementation(own)
    for row, ids in enumerate([PROMPT, OTHER]):
        expected = by_hand(model, ids, last, layers=[1])
        found = logits[row][inputs["attention_mask"][row].bool()]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - by_hand(model, OTHER, 0)).abs().max() > 1e-3


def greedy(model: Any, ids: list[int]) -> tuple[list[int], Tensor]:
    """Tokens and logits of new ones, each of one whole pass without a cache."""
    new: list[int] = []
    steps = []
    for count in range(NEW):
        steps.append(by_hand(model, ids + new, count + 1, prompt=len(ids))[-1])
        new.append(int(steps[-1].argmax()))
    return new, torch.stack(steps)


FEEDING = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "parts": {"prefill_chunk_size": 4},
    "parts into a static cache": {"prefill_chunk_size": 3, "cache_implementation": "static"},
}


@pytest.mark.parametrize("feeding", FEEDING)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_in_any_way(model: Any, feeding: str, padded: bool) -> None:
    rows = [PROMPT, OTHER] if padded else [PROMPT]
    inputs = batch("left") if padded else {"input_ids": torch.tensor([PROMPT])}
    inputs.pop("position_ids", None)
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None}
    with ml.knockout(model, "image"):
        out = model.generate(**inputs, **options, **FEEDING[feeding])
    for row, ids in enumerate(rows):
        new, logits = greedy(model, ids)
        assert out.sequences[row, -NEW:].tolist() == new
        found = torch.stack(out.logits, 1)[row]
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
    assert "generate" not in vars(model)


def test_parts_by_hand(model: Any) -> None:
    """With the whole mask from the first part on; without, the second part is refused."""
    ids = torch.tensor([PROMPT])
    expected = by_hand(model, PROMPT, 2)
    for whole in (torch.ones_like(ids), torch.ones(1, len(PROMPT) + 2).long()):
        cache = transformers.DynamicCache(config=model.config)
        whole[:, len(PROMPT) :] = 0
        with torch.no_grad(), ml.knockout(model, "image", last=2):
            for start, stop in ((0, 4), (4, 10), (10, 11)):
                part = ids[:, start:stop]
                out = model(input_ids=part, attention_mask=whole[:, : max(stop, 11)], cache=cache)
        torch.testing.assert_close(out.logits[0, -1], expected[-1], atol=1e-5, rtol=1e-5)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), ml.knockout(model, "image"):
        model(input_ids=ids[:, :4], cache=cache)
        with pytest.raises(ValueError, match="goes on in another pass"):
            model(input_ids=ids[:, 4:], cache=cache)
    # What has cut nothing yet may go on.
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), ml.knockout(model, "image"):
        model(input_ids=ids[:, :1], cache=cache)
        out = model(input_ids=ids[:, 1:], cache=cache)
    expected = by_hand(model, PROMPT, 1)
    torch.testing.assert_close(out.logits[0, -1], expected[-1], atol=1e-5, rtol=1e-5)
