"""Gradients under gradient checkpointing are those without it, whatever is open when they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import miner_lens as ml
from miner_lens.models.checkpointing import TORCH, TRANSFORMERS, Remembering
from miner_lens.models.hook import ContextHook
from miner_lens.models.modality import ModalityLayout
from miner_lens.neurons.ablation import PreparedAblation, opened_in_rows
from tests.families import build
from tests.models.test_experts import mixtral
from tests.towers import IMAGE, TEXT, vision_inputs, vision_model

Enable = Callable[[Any], None]


def by_transformers(reentrant: bool) -> Enable:
    return lambda model: model.activation_checkpointing_enable({"use_reentrant": reentrant})


def by_torch(reentrant: bool) -> Enable:
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT

    def enable(model: Any) -> None:
        layers = set(model.get_decoder().layers)
        apply_activation_checkpointing(
            model, lambda layer: checkpoint_wrapper(layer, kind), lambda module: module in layers
        )

    return enable


ENABLE = {
    "transformers": by_transformers(False),
    "transformers, reentrant": by_transformers(True),
    "torch": by_torch(False),
    "torch, reentrant": by_torch(True),
}


def llama() -> Any:
    return build("LlamaForCausalLM", **TEXT)


def batch(*lengths: int) -> dict[str, Tensor]:
    torch.manual_seed(sum(lengths))
    ids = torch.randint(3, 90, (len(lengths), max(lengths)))
    ids[:, -4:-2] = IMAGE
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    return logits.log_softmax(-1)[:, 5].sum()


FIRST, SECOND = batch(12, 6, 11), batch(9, 8)


def some(model: Any, seed: int) -> ml.NeuronSet:
    nothing = ml.NeuronSet.of([], model)
    chosen = ml.NeuronSet.random(40, nothing, seed)
    return ml.NeuronSet.from_mask(
        chosen.mask, means=torch.linspace(-1, 1, chosen.mask.numel()).view_as(chosen.mask)
    )


def inside(**options: Any) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        with ml.ablate(model, some(model, 0), **options):
            loss(model, FIRST).backward()

    return run


def afterwards(**options: Any) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        with ml.ablate(model, some(model, 0), **options):
            value = loss(model, FIRST)
        value.backward()

    return run


def in_another(model: Any) -> None:
    with ml.ablate(model, some(model, 0), "min"):
        value = loss(model, FIRST)
    with ml.ablate(model, some(model, 1), 1.0, at="image"):
        value.backward()


def intact_before(model: Any) -> None:
    value = loss(model, FIRST)
    with ml.ablate(model, some(model, 0)):
        value.backward()


def several_passes(model: Any) -> None:
    value = loss(model, FIRST)
    with ml.ablate(model, some(model, 0), "min", at="image"):
        value = value + loss(model, FIRST) + loss(model, SECOND)
        value.backward()


def closed_out_of_order(model: Any) -> None:
    outer, inner = (
        ml.ablate(model, some(model, 0), "min"),
        ml.scale(model, some(model, 1), 2.0, at="image"),
    )
    outer.__enter__()
    inner.__enter__()
    values = [loss(model, FIRST)]
    outer.__exit__(None, None, None)
    values.append(loss(model, SECOND))
    values[0].backward()
    inner.__exit__(None, None, None)
    values[1].backward()


def twice(model: Any) -> None:
    with ml.ablate(model, some(model, 0), "min"):
        value = loss(model, FIRST)
    value.backward(retain_graph=True)
    value.backward()


def written_over(model: Any) -> None:
    inputs = {name: tensor.clone() for name, tensor in FIRST.items()}
    with ml.ablate(model, some(model, 0), "min", at="text"):
        value = loss(model, inputs)
    inputs["attention_mask"].fill_(1)
    value.backward()


def hook_of_the_users(model: Any) -> None:
    activation = model.get_decoder().layers[0].mlp.act_fn
    with ml.ablate(model, some(model, 0), 0.5):
        handle = activation.register_forward_hook(lambda module, args, x: 1.7 * x + 1)
        value = loss(model, FIRST)
    value.backward()
    handle.remove()


def rows(model: Any) -> None:
    off = PreparedAblation(model, some(model, 0), "min", at="image")
    with opened_in_rows(model, [([off], 1), ([], 1), ([off], 1)]):
        value = loss(model, FIRST)
    value.backward()


SCENES: dict[str, Callable[[Any], None]] = {
    "zero, inside": inside(),
    "min, inside": inside(value="min"),
    "at text, inside": inside(at="text"),
    "number": afterwards(value=0.3),
    "mean of the others": afterwards(value="mean", complement=True),
    "min at image": afterwards(value="min", at="image"),
    "in another": in_another,
    "intact before": intact_before,
    "several passes": several_passes,
    "closed out of order": closed_out_of_order,
    "twice": twice,
    "written over": written_over,
    "hook of the user's": hook_of_the_users,
    "rows": rows,
}


def trained(model: Any, scene: Callable[[Any], None], enable: Enable | None) -> Tensor:
    model.train()
    model.modality_layout = ModalityLayout({"image": IMAGE})
    if enable is not None:
        enable(model)
    model.enable_input_require_grads()
    scene(model)
    assert not any(isinstance(one, ContextHook | Remembering) for one in attached(model))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def attached(model: Any) -> Iterator[Any]:
    for module in model.modules():
        yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        yield from (vars(module).get(name) for name in (TRANSFORMERS, TORCH))


def close(ours: Tensor, wanted: Tensor) -> None:
    assert wanted.any()
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("how", ENABLE)
@pytest.mark.parametrize("scene", SCENES)
def test_gradients_are_equal(scene: str, how: str) -> None:
    wanted = trained(llama(), SCENES[scene], None)
    close(trained(llama(), SCENES[scene], ENABLE[how]), wanted)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("scene", ["min at image", "intact before", "several passes"])
@pytest.mark.parametrize("how", ["transformers", "transformers, reentrant"])
def test_experts(scene: str, how: str, wrapped: bool) -> None:
    def model() -> Any:
        made, _ = mixtral()
        if wrapped:
            ml.wrap(made)
        return made

    wanted = trained(model(), SCENES[scene], None)
    close(trained(model(), SCENES[scene], ENABLE[how]), wanted)


@pytest.mark.parametrize("value", ["min", "zero"])
def test_towers(value: str) -> None:
    def run(model: Any) -> None:
        nothing = ml.NeuronSet.of([], model, "vision")
        with ml.ablate(model, ml.NeuronSet.random(40, nothing, 0), value):
            result = loss(model, vision_inputs())
        result.backward()

    close(trained(vision_model(), run, ENABLE["transformers"]), trained(vision_model(), run, None))


@pytest.mark.parametrize("on", [True, False])
def test_switched_inside(on: bool) -> None:
    """As a Trainer does."""

    def run(model: Any) -> None:
        if not on:
            ENABLE["transformers, reentrant"](model)
        with ml.ablate(model, some(model, 0), "min"):
            if on:
                ENABLE["transformers, reentrant"](model)
            value = loss(model, FIRST)
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
        value.backward()

    close(trained(llama(), run, None), trained(llama(), afterwards(value="min"), None))


def test_checkpoints_of_the_users() -> None:
    """Inside the context all is there, also where the user has a whole pass computed again."""

    def run(again: bool) -> Callable[[Any], None]:
        def scene(model: Any) -> None:
            with ml.ablate(model, some(model, 0), "min", at="image"):
                if again:
                    start = torch.zeros((), requires_grad=True)
                    value = checkpoint(lambda _: loss(model, FIRST), start, use_reentrant=False)
                else:
                    value = loss(model, FIRST)
                value.backward()

        return scene

    wanted = trained(llama(), run(False), None)
    close(trained(llama(), run(True), None), wanted)
    close(trained(llama(), run(True), ENABLE["transformers"]), wanted)


def test_hooks_of_a_list_cannot_be_there_again() -> None:
    model = llama()
    bridge = ml.wrap(model)
    hooks = ml.ablation_hooks(bridge, some(model, 0))
    bridge.train()
    model.train()
    ENABLE["transformers"](model)
    with bridge.hooks(fwd_hooks=hooks):
        with torch.no_grad():
            loss(model, FIRST)
        with pytest.raises(ValueError, match=r"Use ml\.ablate"):
            loss(model, FIRST)
