"""TransformerLens's own tools on multimodal models, against plain transformers by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens import patching
from transformer_lens.tools.analysis import (
    JacobianLens,
    Node,
    SubspaceInterchange,
    attribution_patch,
    collect_activations,
    fit_das,
    intervened_logits,
    logit_lens,
    random_basis,
)

import miner_lens as ml
from tests.families import llava, qwen2_audio
from tests.towers import IMAGE, one_image, vision_model

Inputs = dict[str, Any]
OFF = [(layer, neuron) for layer in range(2) for neuron in range(0, 48, 2)]
KINDS = ("qwen2_vl", "qwen2_audio", "llava")


@dataclass
class Setting:
    """A bridge, plain models that compute what it computes, and two media under the same tokens."""

    bridge: Any
    neurons: ml.NeuronSet
    intact: Any
    ablated: Any
    clean: Inputs
    corrupted: Inputs

    @property
    def tokens(self) -> Tensor:
        tokens: Tensor = self.clean["input"]
        return tokens


def picture_inputs() -> Inputs:
    ids = torch.tensor([[5, 6, *[IMAGE] * 4, 7, 8, 9]])
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(1, 3, 8, 8)}


def sound_inputs(inputs: Inputs) -> Inputs:
    """The third sample alone."""
    real = inputs["attention_mask"][2].bool()
    one = {name: inputs[name][2:, real] for name in ("input_ids", "attention_mask")}
    return one | {name: inputs[name][2:] for name in inputs if name not in one}


def make(kind: str) -> tuple[Any, Inputs]:
    torch.manual_seed(0)
    if kind == "qwen2_vl":
        return vision_model(), one_image()
    if kind == "llava":
        return llava()[0], picture_inputs()
    model, inputs = qwen2_audio()
    return model, sound_inputs(inputs)


def other_medium(inputs: Inputs) -> Inputs:
    name = next(name for name in ("pixel_values", "input_features") if name in inputs)
    torch.manual_seed(1)
    return {**inputs, name: torch.randn_like(inputs[name])}


def named(inputs: Inputs) -> Inputs:
    """As ml.inputs names them, with token ids of their own."""
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return {"input": inputs["input_ids"].clone()} | rest


def mlps(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.get_decoder().layers]


@pytest.fixture(scope="module", params=KINDS)
def setting(request: pytest.FixtureRequest) -> Setting:
    intact, inputs = make(request.param)
    with torch.no_grad():
        ablated, wrapped = make(request.param)[0], make(request.param)[0]
        for layer, neuron in OFF:
            mlps(ablated)[layer].down_proj.weight[:, neuron] = 0
    bridge = ml.wrap(wrapped)
    neurons = ml.NeuronSet.of(OFF, bridge)
    pair = named(inputs), named(other_medium(inputs))
    return Setting(bridge, neurons, intact, ablated, *pair)


@pytest.fixture(params=["intact", "ablated"])
def state(request: pytest.FixtureRequest, setting: Setting) -> Iterator[Any]:
    """The plain model that the bridge is to be like; the bridge's ablation is open."""
    with ExitStack() as open_:
        if request.param == "ablated":
            open_.enter_context(ml.ablate(setting.bridge, setting.neurons))
        yield getattr(setting, request.param)


@contextmanager
def writing(layer: nn.Module, write: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what enters a layer of a plain model."""

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (write(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": write(kwargs["hidden_states"])}

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def plain(model: Any, inputs: Inputs) -> Tensor:
    rest = {name: value for name, value in inputs.items() if name != "input"}
    logits: Tensor = model(input_ids=inputs["input"], **rest).logits
    return logits


def residuals(model: Any, inputs: Inputs) -> list[Tensor]:
    """What enters each layer of a plain model, and what leaves the last."""
    seen: list[Tensor] = []

    def see(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    decoder = model.get_decoder()
    with ExitStack() as open_:
        for layer in decoder.layers:
            open_.enter_context(writing(layer, see))
        norm = decoder.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        plain(model, inputs)
        norm.remove()
    return seen


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 11] - logits[0, -1, 12]


def close(ours: Any, theirs: Any, apart: float = 2e-5) -> None:
    torch.testing.assert_close(
        torch.as_tensor(ours), torch.as_tensor(theirs), atol=apart, rtol=1e-4
    )


def test_logit_lens(setting: Setting, state: Any) -> None:
    with ml.bind(setting.bridge, setting.clean), torch.no_grad():
        lens = logit_lens(setting.bridge, setting.tokens, positions=None)
        stack = residuals(state, setting.clean)
        by_hand = [state.lm_head(state.get_decoder().norm(one)) for one in stack]
    close(lens.readout.values, torch.stack(by_hand))


def test_activation_patching(setting: Setting, state: Any) -> None:
    bridge, tokens = setting.bridge, setting.tokens
    with torch.no_grad():
        with ml.bind(bridge, setting.clean):
            _, cache = bridge.run_with_cache(tokens)
        with ml.bind(bridge, setting.corrupted):
            effect = patching.get_act_patch_resid_pre(bridge, tokens, cache, metric)
        clean = residuals(state, setting.clean)
        assert effect.shape == (2, tokens.shape[1])
        for layer, pos in ((0, 3), (1, 3), (1, -1)):

            def patch(x: Tensor, layer: int = layer, pos: int = pos) -> Tensor:
                x = x.clone()
                x[:, pos] = clean[layer][:, pos]
                return x

            with writing(state.get_decoder().layers[layer], patch):
                close(effect[layer, pos], metric(plain(state, setting.corrupted)))
        assert (effect[0] - metric(plain(state, setting.corrupted))).abs().max() > 1e-3


def test_attribution_of_two_media_under_the_same_tokens(setting: Setting, state: Any) -> None:
    clean, corrupted = setting.clean, setting.corrupted
    assert torch.equal(clean["input"], corrupted["input"])
    with ml.bind(setting.bridge, clean, corrupted):
        found = attribution_patch(setting.bridge, clean["input"], corrupted["input"], metric)
    outputs: dict[str, list[Tensor]] = {}
    for name, inputs in (("clean", clean), ("corrupted", corrupted)):
        outputs[name] = []
        handles = [
            mlp.register_forward_hook(lambda _, __, out, name=name: outputs[name].append(out))
            for mlp in mlps(state)
        ]
        logits = plain(state, inputs)
        outputs[name].insert(0, residuals(state, inputs)[0])
        for handle in handles:
            handle.remove()
    differ = [one - two for one, two in zip(*outputs.values(), strict=False)]
    grads = torch.autograd.grad(metric(logits), outputs["corrupted"][1:3])
    scores = found.node_scores
    by_hand = [(d * g).sum(-1)[0] for d, g in zip(differ[1:3], grads, strict=True)]
    for layer, score in enumerate(by_hand):
        for pos in (2, -1):
            node = Node(kind="mlp_out", layer=layer, position=pos % len(score))
            close(scores[node], score[pos])
    assert max(map(abs, scores.values())) > 1e-3


def test_interchange(setting: Setting, state: Any) -> None:
    """Rows in any order keep their own media."""
    bridge = setting.bridge
    other = setting.corrupted | {"input": setting.tokens.clone()}
    other["input"][0, -1] = 13
    rows = [setting.clean, other]
    tokens = torch.cat([one["input"] for one in rows])
    basis, positions = random_basis(32, 3, 0), torch.tensor([-1, -1]) % tokens.shape[1]
    step, answers = SubspaceInterchange(basis), torch.tensor([11, 12, 14])

    def task(ids: Tensor) -> Tensor:
        logits: Tensor = bridge(ids)[:, -1, answers]
        return logits

    name, order = "blocks.0.hook_resid_post", torch.tensor([1, 0, 1])
    options = {"positions": positions[order], "batch_size": 2}
    with ml.bind(bridge, *rows):
        source = collect_activations(bridge, name, tokens[1 - order], task, **options)
        found = intervened_logits(bridge, name, step, tokens[order], source, task, **options)
        das = fit_das(
            bridge,
            name,
            tokens[order],
            tokens[1 - order],
            torch.tensor([0, 1, 2]),
            task,
            rank=2,
            base_positions=positions[order],
            source_positions=positions[order],
            epochs=1,
            batch_size=2,
            strength=0.0,
        )
    with torch.no_grad():
        ends = [residuals(state, one)[1][:, -1] for one in rows]
        expected, intact = [], []
        for base in order.tolist():

            def write(x: Tensor, base: int = base) -> Tensor:
                x = x.clone()
                x[:, -1] = step(ends[base], ends[1 - base])
                return x

            with writing(state.get_decoder().layers[1], write):
                expected.append(plain(state, rows[base])[:, -1, answers])
            intact.append(plain(state, rows[base])[:, -1, answers])
        close(found, torch.cat(expected))
        loss = nn.functional.cross_entropy(torch.cat(intact), torch.tensor([0, 1, 2]))
        # The mean of batches of two and one, weighted by their sizes.
        close(das.losses[0], loss, 1e-4)
        assert (torch.cat(expected) - torch.cat(intact)).abs().max() > 1e-3


def test_jacobian_lens(setting: Setting, state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, tokens = setting.bridge, setting.tokens
    monkeypatch.setattr(bridge, "to_tokens", lambda *_, **__: tokens)
    with ml.bind(bridge, setting.clean):
        options = {"corpus": "one", "skip_first_positions": 0, "show_progress": False}
        lens = JacobianLens.fit(bridge, ["a prompt"], **options)
    first = residuals(state, setting.clean)[1].detach()

    def last(x: Tensor) -> Tensor:
        with writing(state.get_decoder().layers[1], lambda _: x):
            return residuals(state, setting.clean)[2][0, :-1]

    def summed(x: Tensor) -> Tensor:
        return last(x).sum(0)

    by_pos = torch.autograd.functional.jacobian(summed, first)[:, 0, :-1]
    close(lens.jacobians[0], by_pos.mean(1))


def test_stacks_of_the_cache(setting: Setting, state: Any) -> None:
    with ml.bind(setting.bridge, setting.clean), torch.no_grad():
        logits, cache = setting.bridge.run_with_cache(setting.tokens)
        expected = residuals(state, setting.clean)
        close(cache.accumulated_resid(layer=-1), torch.stack(expected))
        parts = cache.decompose_resid(layer=-1)
        close(parts.sum(0), expected[-1])
        # A raw bridge keeps the last norm's weight apart, and a bridge's norm scales alone.
        norm = state.get_decoder().norm
        weighed = cache.apply_ln_to_stack(parts, layer=-1) * norm.weight
        close(weighed.sum(0) @ state.lm_head.weight.T, plain(state, setting.clean))
        close(logits, plain(state, setting.clean))


def test_backward_hooks(setting: Setting, state: Any) -> None:
    seen: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.clone()

    with (
        ml.bind(setting.bridge, setting.clean),
        setting.bridge.hooks(bwd_hooks=[("blocks.1.hook_mlp_out", keep)]),
    ):
        metric(setting.bridge(setting.tokens)).backward()
    setting.bridge.zero_grad()
    outputs: list[Tensor] = []
    handle = mlps(state)[1].register_forward_hook(lambda _, __, out: outputs.append(out))
    logits = plain(state, setting.clean)
    handle.remove()
    (by_hand,) = torch.autograd.grad(metric(logits), outputs)
    (ours,) = seen.values()
    close(ours, by_hand)


def test_loss(setting: Setting, state: Any) -> None:
    with ml.bind(setting.bridge, setting.clean), torch.no_grad():
        loss = setting.bridge(setting.tokens, return_type="loss")
        each = setting.bridge(setting.tokens, return_type="loss", loss_per_token=True)
        logits = plain(state, setting.clean)
    by_hand = nn.functional.cross_entropy(logits[0, :-1], setting.tokens[0, 1:], reduction="none")
    close(loss, by_hand.mean())
    close(each[0], by_hand)


def test_start_at_layer(setting: Setting, state: Any) -> None:
    bridge = setting.bridge
    with ml.bind(bridge, setting.clean), torch.no_grad():
        _, cache = bridge.run_with_cache(setting.tokens)
        expected = plain(state, setting.clean)
        for layer in (0, 1):
            residual = cache[f"blocks.{layer}.hook_resid_pre"]
            close(bridge(residual, start_at_layer=layer), expected)
        twice = torch.cat([residual, 2 * residual])
        found = bridge(twice, start_at_layer=1)
        with writing(state.get_decoder().layers[1], lambda x: 2 * x):
            close(found, torch.cat([expected, plain(state, setting.clean)]))
    with torch.no_grad():
        if hasattr(state.model, "get_rope_index"):
            with pytest.raises(ValueError, match=r"start_at_layer.*ml\.bind"):
                bridge(residual, start_at_layer=1)
        else:
            close(bridge(residual, start_at_layer=1), expected)
    with (
        ml.bind(bridge, setting.clean, setting.corrupted),
        pytest.raises(ValueError, match="2 different rows of that length"),
    ):
        bridge(residual, start_at_layer=1)


@pytest.mark.parametrize("cached", [True, False])
def test_generation(setting: Setting, state: Any, cached: bool) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    inputs = setting.clean | {"input_ids": setting.tokens}
    expected = state.generate(**{n: v for n, v in inputs.items() if n != "input"}, **options)
    options |= {"use_past_kv_cache": cached, "verbose": False, "stop_at_eos": False}
    assert torch.equal(setting.bridge.generate(**setting.clean, **options), expected)
    with ml.bind(setting.bridge, setting.clean):
        assert torch.equal(setting.bridge.generate(setting.tokens, **options), expected)


def test_hooks_at_the_activation_come_after_an_ablation(setting: Setting) -> None:
    """Whichever was first; they read what it wrote, and what they write stays."""
    bridge, seen = setting.bridge, []

    def write(x: Tensor, hook: Any) -> Tensor:
        seen.append(x[..., ::2].abs().max())
        return torch.full_like(x, 0.5)

    hooks = [("blocks.0.mlp.act.hook_out", write)]
    acts = [layer.mlp.act_fn for layer in setting.ablated.get_decoder().layers]
    handle = acts[0].register_forward_hook(lambda _, __, x: torch.full_like(x, 0.5))
    intact_down = mlps(setting.intact)[0].down_proj.weight
    ablated_down = mlps(setting.ablated)[0].down_proj.weight
    kept = ablated_down.detach().clone()
    with torch.no_grad():
        ablated_down.copy_(intact_down)
        expected = plain(setting.ablated, setting.clean)
        with ml.ablate(bridge, setting.neurons):
            close(bridge.run_with_hooks(**setting.clean, fwd_hooks=hooks), expected)
        with bridge.hooks(fwd_hooks=hooks), ml.ablate(bridge, setting.neurons):
            close(bridge(**setting.clean), expected)
        ablated_down.copy_(kept)
    handle.remove()
    assert seen == [0, 0]
