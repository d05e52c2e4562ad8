from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLForConditionalGeneration

import miner_lens as ml
from miner_lens.models import access as models
from miner_lens.models import generation
from tests.analyzers.test_reference_model import logits, model_inputs
from tests.reference import REFERENCE, load
from tests.towers import vision_inputs, vision_model

LAYERS, NEURONS = 3, 96
ANY_NEURONS = st.sets(
    st.tuples(st.integers(0, LAYERS - 1), st.integers(0, NEURONS - 1)), min_size=1, max_size=40
)


@pytest.fixture
def inputs() -> dict[str, Any]:
    return model_inputs(load("tiny_qwen2_vl/expected.npz"), 0)


@pytest.fixture(scope="module")
def bridge() -> Any:
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE}")
    return ml.load(REFERENCE / "tiny_qwen2_vl", device="cpu")


def neuron_set(*pairs: tuple[int, int], **options: Any) -> Any:
    return ml.NeuronSet(pairs, layers=LAYERS, neurons=NEURONS, **options)


SOME = ((0, 3), (0, 90), (2, 17))


def plain_model() -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(REFERENCE / "tiny_qwen2_vl").eval()


def activations(bridge: Any, inputs: dict[str, Any]) -> list[Any]:
    names = [f"blocks.{layer}.mlp.act.hook_out" for layer in range(LAYERS)]
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    _, cache = bridge.run_with_cache(inputs["input_ids"], names_filter=names, **rest)
    return [cache[name] for name in names]


def test_zero_equals_zeroed_weights(bridge: Any, inputs: dict[str, Any]) -> None:
    edited = plain_model()
    with torch.no_grad():
        for layer, neuron in SOME:
            edited.get_decoder().layers[layer].mlp.down_proj.weight[:, neuron] = 0
        theirs = edited(**inputs).logits
    with ml.ablate(bridge, neuron_set(*SOME)):
        torch.testing.assert_close(logits(bridge, inputs), theirs, atol=1e-6, rtol=0)


def test_plain_hugging_face_model(bridge: Any, inputs: dict[str, Any]) -> None:
    model = plain_model()
    with torch.no_grad():
        before = model(**inputs).logits
        with ml.ablate(model, neuron_set(*SOME), value="min", at="image"):
            ablated = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, before)
    assert not torch.equal(ablated, before)
    with ml.ablate(bridge, neuron_set(*SOME), value="min", at="image"):
        torch.testing.assert_close(logits(bridge, inputs), ablated, atol=1e-6, rtol=0)
    assert not any(module._forward_hooks for module in model.modules())
    assert not model._forward_pre_hooks


def test_values(bridge: Any, inputs: dict[str, Any]) -> None:
    means = torch.rand(LAYERS, NEURONS)
    chosen = neuron_set(*SOME, means=means)
    before = activations(bridge, inputs)
    for value in ("zero", 0.7, "min", "mean"):
        with ml.ablate(bridge, chosen, value):
            first = activations(bridge, inputs)[0]
        wanted = {"zero": 0.0, 0.7: 0.7, "min": before[0].min()}.get(value)
        for neuron in (3, 90):
            new = means[0, neuron] if wanted is None else torch.as_tensor(wanted)
            assert torch.equal(first[..., neuron], new.expand(first.shape[:2]))
        others = [n for n in range(NEURONS) if n not in (3, 90)]
        assert torch.equal(first[..., others], before[0][..., others])


def test_only_at_one_modality(bridge: Any, inputs: dict[str, Any]) -> None:
    before = activations(bridge, inputs)[0]
    image = inputs["input_ids"] == 110
    for value in (0.5, "zero", "min"):
        with ml.ablate(bridge, neuron_set(*SOME), value, at="image"):
            after = activations(bridge, inputs)[0]
        wanted = {"zero": 0.0, "min": before.min()}.get(value, 0.5)
        assert (after[image][:, [3, 90]] == wanted).all()
        assert torch.equal(after[~image], before[~image])


def test_complement(bridge: Any, inputs: dict[str, Any]) -> None:
    chosen = neuron_set(*SOME)
    with ml.ablate(bridge, chosen, complement=True):
        complement = logits(bridge, inputs)
        kept = activations(bridge, inputs)
    with ml.ablate(bridge, ~chosen):
        assert torch.equal(logits(bridge, inputs), complement)
    assert kept[1].count_nonzero() == 0
    assert set(kept[2].nonzero()[:, 2].tolist()) == {17}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    share=st.floats(0, 1),
    value=st.sampled_from(["zero", "min", "mean"]) | st.floats(-2, 2, width=32),
    at=st.sampled_from([None, "image", "text"]),
    complement=st.booleans(),
)
def test_against_the_definition(
    bridge: Any, inputs: dict[str, Any], share: float, value: Any, at: Any, complement: bool
) -> None:
    """Any part of a layer's neurons, from none to all."""
    mask, means = torch.rand(LAYERS, NEURONS) < share, torch.randn(LAYERS, NEURONS)
    chosen = ml.NeuronSet.from_mask(mask, means=means)
    before = activations(bridge, inputs)[0]
    with ml.ablate(bridge, chosen, value, at=at, complement=complement):
        after = activations(bridge, inputs)[0]
    new = {"zero": 0.0, "min": before.min(), "mean": means[0]}.get(value, value)
    tokens = models.layout(bridge).masks(inputs["input_ids"])[at or "prompt"][..., None]
    written = tokens & (mask[0] ^ complement)
    assert torch.equal(after, torch.where(written, torch.as_tensor(new), before))


def test_mapping_means_all_of_it(bridge: Any, inputs: dict[str, Any]) -> None:
    parts = {"image": neuron_set(SOME[0]), "text": neuron_set(*SOME[1:])}
    with ml.ablate(bridge, parts):
        all_parts = logits(bridge, inputs)
    with ml.ablate(bridge, neuron_set(*SOME)):
        assert torch.equal(logits(bridge, inputs), all_parts)


def test_inner_context_is_on_top(bridge: Any, inputs: dict[str, Any]) -> None:
    one = neuron_set((1, 5))
    before = logits(bridge, inputs)
    with ml.ablate(bridge, one, 2.0):
        outer = logits(bridge, inputs)
        with ml.ablate(bridge, one, 3.0):
            assert (activations(bridge, inputs)[1][..., 5] == 3).all()
        assert torch.equal(logits(bridge, inputs), outer)
    assert torch.equal(logits(bridge, inputs), before)


def test_reset_hooks_does_not_end_it(bridge: Any, inputs: dict[str, Any]) -> None:
    with ml.ablate(bridge, neuron_set(*SOME)):
        ablated = logits(bridge, inputs)
        bridge.reset_hooks()
        assert torch.equal(logits(bridge, inputs), ablated)
        bridge.reset_hooks(including_permanent=True)
        assert torch.equal(logits(bridge, inputs), ablated)


def test_user_hooks_see_and_override_it(bridge: Any, inputs: dict[str, Any]) -> None:
    seen = []

    def hook(x: Any, hook: Any) -> Any:
        seen.append(x.clone())
        return torch.full_like(x, 0.1)

    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    hooks = [("blocks.0.mlp.act.hook_out", hook)]
    plain = bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=hooks, **rest)
    with ml.ablate(bridge, neuron_set((0, 3))):
        both = bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=hooks, **rest)
    assert (seen[1][..., 3] == 0).all()
    assert torch.equal(plain, both)


def test_hooks_give_the_same(bridge: Any, inputs: dict[str, Any]) -> None:
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    for options in ({}, {"value": 0.3, "at": "text"}, {"value": "min", "complement": True}):
        with ml.ablate(bridge, neuron_set(*SOME), **options):
            context = logits(bridge, inputs)
        hooks = ml.ablation_hooks(bridge, neuron_set(*SOME), **options)
        as_hooks = bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=hooks, **rest)
        assert torch.equal(context, as_hooks)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_leaves_no_trace(bridge: Any, inputs: dict[str, Any], error: Any) -> None:
    before = logits(bridge, inputs)
    weights = copy.deepcopy(bridge.original_model.state_dict())
    hooks = sum(len(module._forward_hooks) for module in bridge.original_model.modules())
    try:
        with ml.ablate(bridge, neuron_set(*SOME), "min", at="prompt"):
            assert not torch.equal(logits(bridge, inputs), before)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error is not None
    assert torch.equal(logits(bridge, inputs), before)
    after = bridge.original_model.state_dict()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert hooks == sum(len(m._forward_hooks) for m in bridge.original_model.modules())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pairs=ANY_NEURONS,
    value=st.sampled_from(["zero", "min"]) | st.floats(-2, 2, width=32),
    at=st.sampled_from([None, "image", "text", "prompt"]),
    complement=st.booleans(),
)
def test_any_ablation_leaves_no_trace(
    bridge: Any, inputs: dict[str, Any], pairs: Any, value: Any, at: Any, complement: bool
) -> None:
    before = logits(bridge, inputs)
    with ml.ablate(bridge, neuron_set(*pairs), value, at=at, complement=complement):
        inside = logits(bridge, inputs)
        assert torch.equal(inside, logits(bridge, inputs))
    assert torch.equal(logits(bridge, inputs), before)


@pytest.mark.parametrize("as_hooks", [False, True])
def test_padding_has_no_part_in_the_minimum(shapes: Any, as_hooks: bool) -> None:
    messages = [
        [{"role": "user", "content": text}]
        for text in ("what color is the shape?", "a red circle is in the picture. is it red?")
    ]
    who = models.identity(shapes)
    some = ml.NeuronSet([(0, n) for n in range(40)], layers=who.layers, neurons=who.neurons)
    batch = generation.prepare_inputs(shapes, messages)
    real = batch["attention_mask"].bool()
    assert not real.all()
    seen = []

    def lower_at_padding(module: Any, args: Any, output: Any) -> Any:
        return output.masked_fill(~real[..., None], -50.0)

    names = ["blocks.0.mlp.act.hook_out"]
    activation = models.mlps(shapes)[0].activation
    handle = activation.register_forward_hook(lower_at_padding)
    with torch.no_grad():
        _, cache = shapes.run_with_cache(batch["input_ids"], names_filter=names, **rest_of(batch))
        wanted = cache[names[0]].masked_fill(~real[..., None], torch.inf).amin((1, 2))
        hooks = ml.ablation_hooks(shapes, some, "min") if as_hooks else []
        look = (names[0], lambda x, hook: seen.append(x))
        with contextlib.nullcontext() if as_hooks else ml.ablate(shapes, some, "min"):
            shapes.run_with_hooks(batch["input_ids"], fwd_hooks=[*hooks, look], **rest_of(batch))
    handle.remove()
    assert torch.equal(seen[0][:, :, 0], wanted[:, None].expand(seen[0].shape[:2]))


def rest_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "input_ids"}


def test_what_others_have_seen_is_not_overwritten(bridge: Any, inputs: dict[str, Any]) -> None:
    kept = []
    activation = models.mlps(bridge)[0].activation
    handle = activation.register_forward_hook(lambda module, args, output: kept.append(output))
    logits(bridge, inputs)
    with ml.ablate(bridge, neuron_set(*SOME), 9.0):
        logits(bridge, inputs)
    handle.remove()
    assert torch.equal(kept[0], kept[1])


def test_static_cache(shapes: Any) -> None:
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    who = models.identity(shapes)
    some = ml.NeuronSet([(0, n) for n in range(99)], layers=who.layers, neurons=who.neurons)
    for options in ({"value": 0.2, "at": "text"}, {"value": "min"}):
        with ml.ablate(shapes, some, **options):
            plain = ml.generate(shapes, sample.messages, 3)
            static = ml.generate(shapes, sample.messages, 3, cache_implementation="static")
        assert plain == static


def test_generation_sees_it(shapes: Any) -> None:
    mlp = models.identity(shapes)
    none = ml.NeuronSet([], layers=mlp.layers, neurons=mlp.neurons)
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    intact = ml.generate(shapes, sample.messages, 4)
    with ml.ablate(shapes, none, complement=True):
        assert ml.generate(shapes, sample.messages, 4) != intact
    with ml.ablate(shapes, none):
        assert ml.generate(shapes, sample.messages, 4) == intact


def test_ablation_at_a_modality_lasts_through_generation(shapes: Any) -> None:
    """With a cache, a decoding step sees one new token, which is text."""
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    mlp = models.identity(shapes)
    everything = ~ml.NeuronSet([], layers=mlp.layers, neurons=mlp.neurons)
    for use_cache in (True, False):
        with ml.ablate(shapes, everything, 0.2, at="text"):
            answer = ml.generate(shapes, sample.messages, 4, use_cache=use_cache)
        if use_cache:
            cached = answer
    assert answer == cached


def test_gradients_pass_through(bridge: Any, inputs: dict[str, Any]) -> None:
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with torch.enable_grad(), ml.ablate(bridge, neuron_set((0, 3))):
        bridge(inputs["input_ids"], **rest).sum().backward()
    gradient = bridge.original_model.get_decoder().layers[0].mlp.gate_proj.weight.grad
    assert gradient[3].count_nonzero() == 0
    assert gradient[4].count_nonzero() > 0
    bridge.original_model.zero_grad()


@pytest.mark.parametrize("share", [0.1, 0.8])
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("at", [None, "image"])
@pytest.mark.parametrize("value", ["zero", "min", "mean", 0.3])
def test_gradients_under_every_option(
    bridge: Any, inputs: dict[str, Any], value: Any, at: Any, complement: bool, share: float
) -> None:
    """As those of hooks that write out of place."""
    mask, means = torch.rand(LAYERS, NEURONS) < share, torch.randn(LAYERS, NEURONS)
    tokens = models.layout(bridge).masks(inputs["input_ids"])[at or "prompt"][..., None]

    def gradients(model: Any) -> list[torch.Tensor]:
        with torch.enable_grad():
            model(**inputs).logits.square().mean().backward()
        return [layer.mlp.gate_proj.weight.grad for layer in model.get_decoder().layers]

    with ml.ablate(
        model := plain_model(), ml.NeuronSet.from_mask(mask, means=means), value, at, complement
    ):
        found = gradients(model)

    twin = plain_model()
    for layer, block in enumerate(twin.get_decoder().layers):
        where = (mask[layer] ^ complement) & tokens

        def write(module: Any, args: Any, x: Any, where: Any = where, layer: int = layer) -> Any:
            new = {"zero": 0.0, "min": x.min(), "mean": means[layer]}.get(value, value)
            return torch.where(where, torch.as_tensor(new), x)

        block.mlp.act_fn.register_forward_hook(write)
    for ours, theirs in zip(found, gradients(twin), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("value", ["zero", "min", "mean", 0.3])
def test_gradients_through_a_tower(value: Any, complement: bool) -> None:
    """As those of hooks that write out of place."""
    inputs, layers, neurons = vision_inputs(), 3, 40
    mask, means = torch.rand(layers, neurons) < 0.3, torch.randn(layers, neurons)
    chosen = ml.NeuronSet.from_mask(mask, means=means, site="vision")
    images = [int(grid.prod()) for grid in inputs["image_grid_thw"]]

    def gradients(model: Any) -> list[torch.Tensor]:
        with torch.enable_grad():
            model(**inputs).logits.square().mean().backward()
        return [block.mlp.fc1.weight.grad for block in model.model.visual.blocks]

    with ml.ablate(model := vision_model(), chosen, value, complement=complement):
        found = gradients(model)

    twin = vision_model()
    for layer, block in enumerate(twin.model.visual.blocks):

        def write(module: Any, args: Any, x: Any, layer: int = layer) -> Any:
            parts = x.split(images if len(x) == sum(images) else [len(x)])  # or the one video
            lowest = torch.cat([part.min().expand(len(part)) for part in parts])[:, None]
            new = {"zero": 0.0, "min": lowest, "mean": means[layer]}.get(value, value)
            return torch.where(mask[layer] ^ complement, torch.as_tensor(new), x)

        block.mlp.act.register_forward_hook(write)
    for ours, theirs in zip(found, gradients(twin), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("at", [None, "image"])
@pytest.mark.parametrize("value", ["zero", "min", "mean", 0.3])
def test_gradients_of_hooks_are_those_of_the_context(
    bridge: Any, inputs: dict[str, Any], value: Any, at: Any, complement: bool
) -> None:
    chosen = neuron_set(*SOME, means=torch.randn(LAYERS, NEURONS))
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    hooks = ml.ablation_hooks(bridge, chosen, value, at, complement)
    weights = [m.before.weight for m in models.mlps(bridge)]
    with torch.enable_grad():
        by_hooks = bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=hooks, **rest)
        with ml.ablate(bridge, chosen, value, at, complement):
            by_context = bridge(inputs["input_ids"], **rest)
        for one, other in zip(
            torch.autograd.grad(by_hooks.sum(), weights),
            torch.autograd.grad(by_context.sum(), weights),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_modalities_cannot_be_told_from_embeddings(bridge: Any, inputs: dict[str, Any]) -> None:
    embeddings = torch.randn(1, 20, 64)
    model = bridge.original_model
    with torch.no_grad():
        model(inputs_embeds=embeddings)
        with ml.ablate(bridge, neuron_set(*SOME), "min"):
            model(inputs_embeds=embeddings)
        with ml.ablate(bridge, neuron_set(*SOME), at="text"):
            model(**inputs)
            with pytest.raises(ValueError, match="Call the model with input_ids"):
                model.get_decoder()(inputs_embeds=embeddings)
            with pytest.raises(ValueError, match="Call the model with input_ids"):
                model(inputs_embeds=embeddings)


def test_refusals(bridge: Any, shapes: Any, inputs: dict[str, Any]) -> None:
    some = neuron_set(*SOME)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (some, {"value": "max"}, "value must be 'zero', 'min', 'mean' or a number"),
        (some, {"value": None}, "value must be"),
        (some, {"value": "mean"}, "carries none"),
        (some, {"at": "audio"}, "no modality 'audio'"),
        ({}, {}, "non-empty mapping"),
        ([(0, 1)], {}, "must be a NeuronSet"),
        (ml.NeuronSet([(0, 1)], layers=2, neurons=9), {}, "2 layers x 9 neurons"),
    ]
    for neurons, options, message in cases:
        for function in (ml.ablation_hooks, _enter):
            with pytest.raises(ValueError, match=message):
                function(bridge, neurons, **options)
    with pytest.raises(ValueError, match="needs a TransformerBridge"):
        ml.ablation_hooks(bridge.original_model, some)


def test_neurons_of_another_model(bridge: Any, shapes: Any) -> None:
    here, there = models.identity(bridge), models.identity(shapes)
    foreign = ml.NeuronSet([(0, 1)], layers=there.layers, neurons=there.neurons, identity=there)
    with pytest.raises(ValueError, match="6 layers x") as error:
        _enter(bridge, foreign)
    assert "3" in str(error.value)
    other = plain_model()
    with torch.no_grad():
        other.get_decoder().layers[0].mlp.gate_proj.weight.normal_()
    own = neuron_set(*SOME, identity=here)
    with pytest.raises(ValueError, match="transfer"):
        _enter(other, own)
    _enter(other, own.transfer(models.identity(other)))


def _enter(model: Any, neurons: Any, **options: Any) -> None:
    with ml.ablate(model, neurons, **options):
        pass
