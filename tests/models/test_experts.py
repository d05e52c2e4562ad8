"""Models of experts, held against plain Hugging Face and the definition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import miner_lens as ml
from miner_lens.analyzers.directions import output_direction
from miner_lens.models import access as models
from miner_lens.models.description import describe
from tests import towers
from tests.families import (
    GRID,
    ROPE,
    SIGLIP,
    Inputs,
    Made,
    build,
    grid_config,
    pictures,
    prompts,
    text,
    timestamped,
)
from tests.models.test_families import Spy, generated, logits, pattern
from tests.models.test_inside import shape_of
from tests.parts import Part
from tests.scoring.test_kernels import twin
from tests.towers import IMAGE, TEXT

EXPERTS, UNITS = 4, 24
WIDTH = EXPERTS * UNITS
NEURONS = [(layer, neuron) for layer in range(2) for neuron in range(0, WIDTH, 3)]

pytestmark = pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")


def mixtral(**options: Any) -> Made:
    config = TEXT | {"intermediate_size": UNITS, "num_local_experts": EXPERTS} | options
    return build("MixtralForCausalLM", **config), prompts(
        [(5, 3), (6, 2), (7, 1)], [(7, 2), (8, 1)]
    )


def qwen3_moe(**options: Any) -> Made:
    config = TEXT | {
        "head_dim": 8,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": UNITS,
    }
    return build("Qwen3MoeForCausalLM", **config | options), mixtral()[1]


def qwen3_vl_moe() -> Made:
    vision = GRID | {"hidden_size": 20, "intermediate_size": 40, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    decoder = text("qwen3_vl_moe_text", head_dim=8, rope_parameters=ROPE, num_experts=EXPERTS)
    decoder |= {"num_experts_per_tok": 3, "moe_intermediate_size": UNITS}
    model = build("Qwen3VLMoeForConditionalGeneration", **grid_config(vision, decoder))
    return model, timestamped(towers.vision_inputs())


def aria() -> Made:
    """It has its experts' weights transposed, and shared experts beside them."""
    model = build(
        "AriaForConditionalGeneration",
        text_config=TEXT
        | {
            "model_type": "aria_text",
            "intermediate_size": UNITS,
            "moe_num_experts": EXPERTS,
            "moe_topk": 2,
        },
        vision_config=SIGLIP | {"model_type": "idefics3_vision"},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={4: 2},
    )
    return model, pictures(2)


@dataclass
class Family:
    """A tiny model with experts, its plain copy, and the name of its layers."""

    untouched: Any
    bridge: Any
    inputs: Inputs
    layers: str
    before: Tensor

    @property
    def real(self) -> Tensor:
        real: Tensor = self.inputs["attention_mask"].bool()
        return real

    def experts(self, model: Any) -> list[Any]:
        return [layer.mlp.experts for layer in model.get_submodule(self.layers)]

    def zeroed(self, neurons: list[tuple[int, int]]) -> Any:
        edited = copy.deepcopy(self.untouched)
        with torch.no_grad():
            for layer, neuron in neurons:
                expert, unit = divmod(neuron, UNITS)
                experts = self.experts(edited)[layer]
                down = experts.down_proj[expert]
                (down.T if experts.is_transposed else down)[:, unit] = 0
        return edited


MADE: dict[str, tuple[Callable[[], Made], str]] = {
    "mixtral": (mixtral, "model.layers"),
    "qwen3_moe": (qwen3_moe, "model.layers"),
    "qwen3_vl_moe": (qwen3_vl_moe, "model.language_model.layers"),
    "aria": (aria, "model.language_model.layers"),
}


@pytest.fixture(scope="module", params=MADE)
def family(request: pytest.FixtureRequest) -> Family:
    make, layers = MADE[request.param]
    model, inputs = make()
    untouched = copy.deepcopy(model)
    for one in (model, untouched):
        generated(one, inputs)  # has Hugging Face put hooks of its own onto some models
    return Family(untouched, ml.wrap(model), inputs, layers, logits(untouched, inputs))


def activations(family: Family) -> list[Tensor]:
    """X of each layer, [batch pos neuron], from what each expert is given."""
    model, seen = copy.deepcopy(family.untouched), []

    def look(experts: Any, args: tuple[Tensor, ...]) -> None:
        hidden, index, _ = args
        x = torch.zeros(len(hidden), EXPERTS, UNITS)
        for token, chosen in enumerate(index.tolist()):
            for expert in chosen:
                weight = experts.gate_up_proj[expert]
                weight = weight.T if experts.is_transposed else weight
                x[token, expert] = silu(weight[:UNITS] @ hidden[token])
        seen.append(x.view(*family.real.shape, WIDTH))

    for experts in family.experts(model):
        experts.register_forward_pre_hook(look)
    logits(model, family.inputs)
    return seen


def test_scores_are_those_of_the_definition(family: Family) -> None:
    masks = models.layout(family.bridge).masks(family.inputs["input_ids"], family.real)
    scores = ml.mine(family.bridge, [(family.inputs, masks)], progress=False)
    part = Part(family.layers, "mlp.experts.act_fn", "self_attn", "")
    spy = Spy(copy.deepcopy(family.untouched), family.inputs, part)
    for layer, (x, ((q, k, _),)) in enumerate(zip(activations(family), spy.calls, strict=True)):
        assert (x == 0).any(-1).all()  # no token goes to all experts
        expected = []
        for sample, real in enumerate(family.real):
            p = pattern(q[sample][:, real], k[sample][:, real])
            own = torch.stack([mask[sample, real] for mask in masks.values()])
            expected.append(twin(x[sample, real], p, own))
        mean = torch.stack(expected).mean(0).float()
        torch.testing.assert_close(scores.values[:, :, layer], mean, atol=1e-5, rtol=0)
    assert scores.values.shape[2:] == (2, WIDTH)
    assert len(scores.select(0.1)) > 0


def test_ablation_is_zeroed_weights_and_leaves_no_trace(family: Family) -> None:
    neurons = ml.NeuronSet(NEURONS, layers=2, neurons=WIDTH)
    edited = family.zeroed(NEURONS)
    expected, real = logits(edited, family.inputs), family.real
    intact = logits(family.bridge, family.inputs)
    for model in (family.bridge, copy.deepcopy(family.untouched)):
        first = logits(model, family.inputs)
        with ml.ablate(model, neurons):
            ablated = logits(model, family.inputs)
            tokens = generated(model, family.inputs)
        torch.testing.assert_close(ablated[real], expected[real], atol=1e-5, rtol=0)
        assert torch.equal(tokens, generated(edited, family.inputs))
        assert torch.equal(logits(model, family.inputs), first)
    hooks = ml.ablation_hooks(family.bridge, neurons)
    with torch.no_grad(), family.bridge.hooks(fwd_hooks=hooks):
        hooked = logits(family.bridge, family.inputs)
    torch.testing.assert_close(hooked[real], expected[real], atol=1e-5, rtol=0)
    assert not torch.allclose(hooked[real], intact[real])


def test_the_complement(family: Family) -> None:
    neurons = ml.NeuronSet(NEURONS, layers=2, neurons=WIDTH)
    others = [(layer, n) for layer in range(2) for n in range(WIDTH) if n % 3]
    with ml.ablate(family.bridge, neurons, complement=True):
        ours = logits(family.bridge, family.inputs)
    theirs = logits(family.zeroed(others), family.inputs)
    torch.testing.assert_close(ours[family.real], theirs[family.real], atol=1e-5, rtol=0)


def test_reading_changes_nothing(family: Family) -> None:
    first = logits(family.bridge, family.inputs)
    point = "blocks.1.mlp.act.hook_out"
    seen: list[Tensor] = []
    with family.bridge.hooks(fwd_hooks=[(point, lambda x, hook: seen.append(x.clone()))]):
        assert torch.equal(logits(family.bridge, family.inputs), first)
        assert torch.equal(logits(copy.deepcopy(family.bridge), family.inputs), first)
    torch.testing.assert_close(
        seen[0][family.real], activations(family)[1][family.real], atol=1e-5, rtol=0
    )
    assert len(seen) == 2


def test_unwrapped_is_as_never_wrapped(family: Family) -> None:
    plain = ml.unwrap(family.bridge)
    try:
        assert shape_of(plain) == shape_of(family.untouched)
        assert torch.equal(logits(plain, family.inputs), family.before)
    finally:
        family.bridge = ml.wrap(plain)


def test_baked_models_are_ablated_ones(family: Family, tmp_path: Path) -> None:
    neurons = ml.NeuronSet(NEURONS, layers=2, neurons=WIDTH)
    plain = copy.deepcopy(family.untouched)
    path = ml.bake(plain, neurons, tmp_path / "baked")
    baked = type(plain).from_pretrained(path).eval()
    with ml.ablate(plain, neurons):
        ours = logits(plain, family.inputs)
    real = family.real
    torch.testing.assert_close(logits(baked, family.inputs)[real], ours[real], atol=1e-5, rtol=0)


def test_descriptions(family: Family) -> None:
    found = describe(family.bridge)
    assert (found.sites[0].neurons, found.sites[0].experts) == (WIDTH, EXPERTS)
    assert "llm: 4 experts of 24 neurons each" in str(found)
    shared = "shared" in str(list(family.untouched.named_modules()))
    assert ("only neurons of routed ones are counted" in str(found)) == shared


def test_ablating_at_a_modality() -> None:
    model, inputs = qwen3_vl_moe()
    bridge = ml.wrap(copy.deepcopy(model))
    neurons = ml.NeuronSet(NEURONS, layers=2, neurons=WIDTH)
    at_image = inputs["input_ids"] == IMAGE

    def cut(experts: Any, args: tuple[Tensor, ...], kept: Tensor) -> Tensor:
        # What the experts give with their weights cut off, at tokens of images.
        edited = copy.deepcopy(experts)
        edited._forward_hooks.clear()
        edited.down_proj.view(EXPERTS, 32, UNITS)[:, :, ::3] = 0
        return torch.where(at_image.flatten()[:, None], edited(*args), kept)

    with ml.ablate(bridge, neurons, at="image"):
        ours = logits(bridge, inputs)
    for layer in model.model.language_model.layers:
        layer.mlp.experts.register_forward_hook(cut)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], logits(model, inputs)[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_whatever_computes_experts(implementation: str) -> None:
    model, inputs = mixtral()
    model.set_experts_implementation(implementation)
    real = inputs["attention_mask"].bool()
    expected = logits(model, inputs)[real]
    neurons = ml.NeuronSet(NEURONS, layers=2, neurons=WIDTH)
    with ml.ablate(model, neurons):
        ablated = logits(model, inputs)[real]
    assert torch.equal(logits(model, inputs)[real], expected)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj[..., ::3] = 0
    torch.testing.assert_close(logits(model, inputs)[real], ablated, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, ablated)


def test_a_mean_of_experts_is_no_value() -> None:
    model, inputs = mixtral()
    bridge = ml.wrap(model)
    data = [(inputs, {"prompt": inputs["attention_mask"].bool()})]
    scores = ml.mine(bridge, data, progress=False)
    neurons = scores.select(0.1, split="prompt")["prompt"]
    for opens in (ml.ablate, ml.ablation_hooks):
        with pytest.raises(ValueError, match="not defined for neurons of experts"):
            opens(bridge, neurons, "mean").__enter__()  # type: ignore[operator]


def test_output_directions() -> None:
    model, _ = mixtral()
    expected = model.model.layers[1].mlp.experts.down_proj[2, :, 5].detach().clone()
    assert torch.equal(output_direction(ml.wrap(model), 1, 2 * UNITS + 5), expected)


def test_fingerprints() -> None:
    bridge = ml.wrap(mixtral()[0])
    first = models.identity(bridge)
    assert first.neurons == WIDTH
    assert first.fingerprint is not None
    bridge.original_model.model.layers[0].mlp.experts.down_proj.data.mul_(1.5)
    assert models.identity(bridge).fingerprint != first.fingerprint


def test_gradients() -> None:
    """Attribution of experts is X times the gradient, 0 where they are not routed to."""
    model, inputs = mixtral()
    bridge = ml.wrap(model)
    seen: list[Tensor] = []
    hook = ("blocks.0.mlp.act.hook_out", lambda x, hook: seen.append(x))
    with bridge.hooks(fwd_hooks=[hook]):
        output = model(**inputs).logits
    seen[0].retain_grad()
    output.sum().backward()
    gradient = seen[0].grad
    assert gradient is not None
    assert gradient[seen[0] != 0].any()
    assert not gradient[seen[0] == 0].any()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_copy_made_inside_is_intact(wrapped: bool) -> None:
    plain, inputs = mixtral()
    model = ml.wrap(plain) if wrapped else plain
    intact = logits(plain, inputs)
    with ml.ablate(model, ml.NeuronSet(NEURONS, layers=2, neurons=WIDTH)):
        ablated = logits(plain, inputs)
        assert torch.equal(logits(copy.deepcopy(model), inputs), intact)
        assert torch.equal(logits(plain, inputs), ablated)
    assert not torch.allclose(ablated, intact)


def test_offloaded_experts() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = mixtral()
    untouched = shape_of(model)
    neurons = ml.NeuronSet(NEURONS, layers=2, neurons=WIDTH)
    with ml.ablate(model, neurons):
        expected = logits(model, inputs)
    assert shape_of(model) == untouched
    offloaded = accelerate.cpu_offload(model)
    assert offloaded.model.layers[0].mlp.experts.down_proj.is_meta
    before = shape_of(offloaded)
    with ml.ablate(offloaded, neurons):
        assert torch.equal(logits(offloaded, inputs), expected)
    assert shape_of(offloaded) == before


def gpt_oss() -> tuple[Any, Inputs, Callable[[Any, tuple[Tensor, ...]], Tensor]]:
    """Its gate is clamped and no module, up has 1 added, and both lie side by side."""
    more = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": UNITS}
    model = build("GptOssForCausalLM", **TEXT | more | {"head_dim": 8})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
            elif "gate_up" in name:
                parameter.mul_(4)  # so that some are clamped

    def x_of(experts: Any, args: tuple[Tensor, ...]) -> Tensor:
        x = torch.zeros(len(args[0]), EXPERTS, UNITS)
        for token, chosen in enumerate(args[1].tolist()):
            for one in chosen:
                both = args[0][token] @ experts.gate_up_proj[one] + experts.gate_up_proj_bias[one]
                gate = both[::2].clamp(max=7)
                x[token, one] = gate * torch.sigmoid(1.702 * gate)
        return x

    return model, mixtral()[1], x_of


def llama4() -> tuple[Any, Inputs, Callable[[Any, tuple[Tensor, ...]], Tensor]]:
    """Experts are given every token, multiplied by 0 where it is not theirs."""
    more = {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size": UNITS}
    more |= {"interleave_moe_layer_step": 1, "head_dim": 8}

    def x_of(experts: Any, args: tuple[Tensor, ...]) -> Tensor:
        given = args[0].view(EXPERTS, -1, 32)
        gates = [g @ w[:, :UNITS] for g, w in zip(given, experts.gate_up_proj, strict=True)]
        return silu(torch.stack(gates, 1))

    return build("Llama4ForCausalLM", **TEXT | more), mixtral()[1], x_of


@pytest.mark.parametrize("make", [gpt_oss, llama4])
def test_experts_of_another_kind(make: Callable[..., Any]) -> None:
    model, inputs, x_of = make()
    untouched = copy.deepcopy(model)
    bridge = ml.wrap(model)
    real = inputs["attention_mask"].bool()
    before = logits(bridge, inputs)
    torch.testing.assert_close(before[real], logits(untouched, inputs)[real], atol=1e-5, rtol=0)
    data = [(inputs, {"prompt": real})]
    scores = ml.mine(bridge, data, metrics=("prob", "mean", "max"), progress=False)
    experts = [getattr(m, "experts", None) for m in untouched.modules()]
    seen: list[Tensor] = []
    handles = [
        one.register_forward_pre_hook(lambda m, args: seen.append(x_of(m, args)))
        for one in filter(None, experts)
    ]
    logits(untouched, inputs)
    for handle in handles:
        handle.remove()
    assert scores.means is not None
    for layer, x in enumerate(seen):
        own = x.view(*real.shape, WIDTH)
        mean = torch.stack([a[r].mean(0) for a, r in zip(own, real, strict=True)]).mean(0)
        torch.testing.assert_close(scores.means[0, layer], mean, atol=1e-5, rtol=0)
    found: list[Tensor] = []
    hook = ("blocks.1.mlp.act.hook_out", lambda x, hook: found.append(x))
    with bridge.hooks(fwd_hooks=[hook]):
        output = model(**inputs).logits
    assert torch.equal(output, before)
    found[0].retain_grad()
    output[real].sum().backward()
    assert found[0].grad is not None
    assert found[0].grad[found[0] != 0].any()
    for one in filter(None, experts):
        one.down_proj.data[:, ::3] = 0
    with ml.ablate(bridge, ml.NeuronSet(NEURONS, layers=2, neurons=WIDTH)):
        ours = logits(bridge, inputs)[real]
    torch.testing.assert_close(ours, logits(untouched, inputs)[real], atol=1e-5, rtol=0)
    assert not torch.allclose(ours, before[real])
    assert torch.equal(logits(bridge, inputs), before)
