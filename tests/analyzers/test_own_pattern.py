"""The pattern that a model has, whatever it is made of, against eager attention's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.analyzers import attention_sums
from miner_lens.analyzers.attention_sums import AttentionSums, LargestAttention, ReceivedAttention
from miner_lens.models import attention, sites
from miner_lens.models.forward import evaluating
from miner_lens.models.modality import ModalityLayout
from miner_lens.models.points import Point, activation_points
from miner_lens.running.batch import Batch
from miner_lens.running.hooks import pass_hooks
from miner_lens.scoring import kernels
from tests import families
from tests.families import build
from tests.towers import IMAGE, TEXT

pytestmark = pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")

HEAD = {"head_dim": 8}
WINDOW = HEAD | {"sliding_window": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CAPPED = WINDOW | {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}
CHUNKS = HEAD | {"attention_chunk_size": 4, "interleave_moe_layer_step": 2}
LLAMA4 = CHUNKS | {"num_local_experts": 4, "intermediate_size_mlp": 48}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
SMALL = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4}
INKLING = HEAD | SMALL | {"sliding_window_size": 4, "rel_extent": 8, "n_routed_experts": 4}
INKLING |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Attention that is rebuilt by TransformerLens, or transformers' own.
FAMILIES = {
    "plain": ("LlamaForCausalLM", {}),
    "window": ("MistralForCausalLM", WINDOW),
    "window, native": ("MinistralForCausalLM", WINDOW),
    "window and not": ("Gemma3ForCausalLM", MIXED),
    "chunks, native": ("Llama4ForCausalLM", LLAMA4),
    "sinks": ("GptOssForCausalLM", WINDOW | EXPERTS),
    "sinks, native": ("MiMoV2FlashForCausalLM", WINDOW | EXPERTS),
    "soft cap": ("Gemma2ForCausalLM", CAPPED),
    "position bias, native": ("InklingForCausalLM", INKLING),
}
ROWS = [list(range(3, 15)), [5, 6, 7, IMAGE, IMAGE, 8, 9]]


class Weights(ml.Analyzer[dict[int, list[Tensor]]]):
    """Keeps what all that reads the model's own pattern gives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, list[Tensor]] = {}
        self.sums = [AttentionSums("llm", True), ReceivedAttention(), LargestAttention("llm", True)]

    def needs(self) -> list[AttentionSums]:
        return self.sums

    def points(self, model: Any) -> list[Point]:
        return activation_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        self.found[point.layer] = [sums.of_layer(batch, point.layer) for sums in self.sums]

    def result(self) -> dict[int, list[Tensor]]:
        return self.found


def inputs_of(side: str) -> dict[str, Tensor]:
    longest = max(map(len, ROWS))
    gaps = [[0] * (longest - len(row)) for row in ROWS]
    left = side == "left"
    rows = [gap + row if left else row + gap for gap, row in zip(gaps, ROWS, strict=True)]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def masks_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    padding = inputs.get("attention_mask", torch.ones_like(ids))
    real = (padding if padding.ndim == 2 else torch.ones_like(ids)).bool()
    return {"text": real & (ids != IMAGE), "image": real & (ids == IMAGE), "prompt": real}


def patterns(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Each layer's head mean in the plain model, [sample query key]."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    return [attention.double().mean(1) for attention in attentions]


def expected(pattern: Tensor, masks: dict[str, Tensor]) -> list[Tensor]:
    """What the definitions make of a pattern: attn_k and attn_q, attended, the largest."""
    samples, _, pos = pattern.shape
    published = torch.zeros(samples, 2, len(masks), pos, dtype=torch.float64)
    attended, largest = published[:, :1].clone(), published[:, 0, :, 0].clone()
    for sample in range(samples):
        received = pattern[sample, masks["prompt"][sample]].sum(0)
        for place, mask in enumerate(masks.values()):
            own = mask[sample]
            if own.any():
                a = pattern[sample][own][:, own]
                published[sample, 0, place, own] = a.softmax(0).sum(1)
                published[sample, 1, place, own] = a.softmax(1).sum(0)
                attended[sample, 0, place, own] = received[own] / received[own].sum()
                largest[sample, place] = a.max()
    return [published, attended, largest]


def check(model: Any, inputs: dict[str, Tensor]) -> None:
    masks = masks_of(inputs)
    wanted = [expected(pattern, masks) for pattern in patterns(model, inputs)]
    found = ml.run(ml.wrap(model), [(inputs, masks)], Weights(), progress=False)
    assert sorted(found) == [0, 1]
    for layer, weights in found.items():
        for one, want in zip(weights, wanted[layer], strict=True):
            torch.testing.assert_close(one.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_is_that_of_eager_attention(family: str, side: str) -> None:
    name, more = FAMILIES[family]
    check(build(name, **TEXT | more), inputs_of(side))


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "qwen2_vl", "smolvlm"])
def test_it_is_that_of_multimodal_models(family: str) -> None:
    """Of two of them, tokens of an image or of all the prompt see later ones."""
    check(*getattr(families, family)())


MASK = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.5
MASK = MASK | torch.eye(12, dtype=torch.bool)
ADDED = torch.zeros(1, 1, 12, 12).masked_fill(~MASK, torch.finfo(torch.float).min)
BIAS = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("given", [ADDED, ADDED + BIAS[:, :1], ADDED + BIAS])
def test_masks_by_hand(given: Tensor) -> None:
    """True and False, or what is added to scores, for all heads or for each."""
    model = build("MinistralForCausalLM", **TEXT | HEAD)
    inputs = {"input_ids": torch.tensor(ROWS[:1])}
    masks = masks_of(inputs)
    wanted = [
        expected(pattern, masks) for pattern in patterns(model, inputs | {"attention_mask": given})
    ]
    bridge, batch, analyzer = ml.wrap(model), Batch(inputs, masks, ("one",)), Weights()
    analyzer.begin(bridge)
    analyzer.open(batch, model)
    hooks = pass_hooks([analyzer], bridge, lambda: batch)
    mask = MASK if given is ADDED else given
    with torch.no_grad(), evaluating(bridge), bridge.hooks(fwd_hooks=hooks):
        bridge.original_model(**inputs, attention_mask=mask, use_cache=False)
    for layer, weights in analyzer.found.items():
        for one, want in zip(weights, wanted[layer], strict=True):
            torch.testing.assert_close(one.double(), want, atol=1e-5, rtol=0)


def test_samples_packed_into_a_row() -> None:
    positions = torch.tensor([[*range(5), *range(7)]])
    inputs = {"input_ids": torch.tensor(ROWS[:1]), "position_ids": positions}
    check(build("MinistralForCausalLM", **TEXT | HEAD), inputs)


def test_a_mask_that_is_written_into_is_read_again() -> None:
    batch = Batch({"input_ids": torch.ones(1, 3, dtype=torch.long)}, {}, ("one",))
    query = torch.zeros(1, 2, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    call = attention.Call(mask, causal=False, explicit=False)
    look = partial(attention_sums.visible, call, batch, 0, query, query)
    assert look() == {"causal": True}  # so that what nobody sees need not be computed
    mask[..., 2, 0] = False
    found = look()["attention_mask"]
    assert torch.equal(found, mask)
    with torch.inference_mode():
        inferred = attention.Call(torch.ones(1, 1, 3, 3) > 0, causal=False, explicit=False)
        assert "attention_mask" in attention_sums.visible(inferred, batch, 0, query, query)


def test_plain_causal_attention_is_read_as_ever() -> None:
    """Padded on the left it has a mask, and what is computed is the triangle below it."""
    inputs = families.qwen2_vl()[1]
    bridge = ml.wrap(families.qwen2_vl()[0])
    masks = masks_of(inputs)
    queries: list[Tensor] = []
    names = [f"blocks.0.attn.hook_rot_{part}" for part in "qk"]
    keep = [(name, lambda x, hook: queries.append(x.detach().transpose(1, 2))) for name in names]
    found = ml.run(bridge, [(inputs, masks)], Weights(), progress=False)[0]
    with torch.no_grad(), bridge.hooks(fwd_hooks=keep), evaluating(bridge):
        bridge.original_model(**inputs)
    stacked = torch.stack(list(masks.values()), 1)
    options = {"causal": True, "mask": inputs["attention_mask"].bool()}
    options["scale"] = attention.scale_of(bridge.blocks[0].attn)
    assert torch.equal(found[0], kernels.fused_attention_sums(*queries, stacked, **options))


@pytest.mark.parametrize("family", ["window, native", "chunks, native"])
def test_a_static_cache_has_room_for_more_keys(family: str) -> None:
    name, more = FAMILIES[family]
    model = build(name, **TEXT | more)
    inputs = {"input_ids": torch.tensor(ROWS[:1])}
    masks = masks_of(inputs)
    wanted = [expected(pattern, masks) for pattern in patterns(model, inputs)]
    model.set_attn_implementation("sdpa")
    bridge, analyzer = ml.wrap(model), Weights()
    bridge.modality_layout = ModalityLayout({"image": IMAGE}, frozenset())
    options = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static"}
    with bridge.hooks(fwd_hooks=analyzer.hooks(bridge)):
        bridge.original_model.generate(**inputs, **options)
    for layer, weights in analyzer.found.items():
        # Of text alone, of which the layout has more modalities than the masks here.
        found, want = weights[1][:, 0, 0].double(), wanted[layer][1][:, 0, 0]
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


def test_keys_that_are_not_the_prompts_are_refused() -> None:
    """As where a prefix is learned, which is in the cache before the prompt."""
    batch = Batch({"input_ids": torch.ones(1, 3, dtype=torch.long)}, {}, ("one",))
    query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool).tril(2)
    for call in (attention.Call(mask, False, False), attention.Call(None, False, False)):
        with pytest.raises(RuntimeError, match="layer 7 looks at keys that are not the prompt's"):
            attention_sums.visible(call, batch, 7, query, key)
    analyzer = ReceivedAttention()
    pattern = torch.full((1, 2, 3, 5), 0.2)
    with pytest.raises(RuntimeError, match="5 of them for 3 queries"):
        analyzer.keep_pattern(7, batch, pattern)


@pytest.mark.parametrize("causal", [True, False])
def test_a_tower_that_attends_otherwise_is_refused(causal: bool) -> None:
    """By an argument, or by a mask that hides what is of the same image."""
    model, inputs = families.llava()
    masks = masks_of(inputs)
    bridge = ml.wrap(model)
    module = sites.find(model, "vision").attentions()[1].original_component
    hidden = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    options = {"site": "vision", "metrics": ("attended",), "progress": False}
    intact = ml.mine(bridge, [(inputs, masks)], **options)
    if causal:
        module.is_causal = True
    else:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attention_mask": hidden}), with_kwargs=True
        )
    with pytest.raises(RuntimeError, match="layer 1 in site 'vision' is not a softmax over all"):
        ml.mine(bridge, [(inputs, masks)], **options)
    assert intact.values.any()


def test_flow_of_last_tokens_before_padding() -> None:
    """Each row's last real token, whichever side is padded."""
    model = ml.wrap(build("LlamaForCausalLM", **TEXT))

    def objective(logits: Tensor, batch: Batch) -> Tensor:
        at = (batch.real * torch.arange(batch.real.shape[1])).amax(1)
        return logits[torch.arange(len(logits)), at].log_softmax(-1)[:, 7]

    found = []
    for side in ("left", "right"):
        inputs = inputs_of(side)
        if side == "left":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        masks = masks_of(inputs)
        flow = ml.run(
            model,
            [(inputs, masks)],
            ml.AttentionFlowAnalyzer(),
            objective=objective,
            progress=False,
        )
        found.append(flow.values)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert found[1].abs().amax((1, 2, 3)).min() > 1e-4
