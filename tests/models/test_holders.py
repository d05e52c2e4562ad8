"""What several contexts share ends with the last of them, in any order and in any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import permutations
from typing import Any

import pytest
import torch

import miner_lens as ml
from miner_lens.models.features import Features
from miner_lens.models.forward import differentiable, evaluating
from miner_lens.models.holders import held
from miner_lens.models.inside import uncompiled
from miner_lens.models.modality import ModalityLayout
from miner_lens.neurons.active import active, noted
from tests.families import build, llava
from tests.models.test_experts import mixtral
from tests.towers import TEXT

IDS = torch.arange(3, 15)[None]


def llama() -> Any:
    return build("LlamaForCausalLM", **TEXT)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def stance() -> str:
    now = torch.compiler.set_stance("default")
    now.__exit__(None, None, None)
    return str(now.prev.stance)


def close(context: AbstractContextManager[Any], in_thread: bool) -> None:
    def leave() -> None:
        context.__exit__(None, None, None)

    if in_thread:
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
    else:
        leave()


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_change_lasts_as_long_as_somebody_needs_it(
    order: tuple[int, ...], in_thread: bool
) -> None:
    made: list[str] = []

    @contextmanager
    def change() -> Iterator[None]:
        made.append("made")
        yield
        made.append("undone")

    contexts = [held("a test", change) for _ in order]
    for context in contexts:
        context.__enter__()
    for place in order:
        assert made == ["made"]
        close(contexts[place], in_thread)
    assert made == ["made", "undone"]


def test_a_change_that_fails_is_not_in_force() -> None:
    @contextmanager
    def fail() -> Iterator[None]:
        raise RuntimeError
        yield

    for _ in range(2):
        with pytest.raises(RuntimeError), held("a test", fail):
            pass


def evaluated(bridge: Any) -> Any:
    model = bridge.original_model
    return model.training, model.config._attn_implementation


CONTEXTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "evaluating": (evaluating, evaluated),
    "differentiable": (
        lambda bridge: differentiable(bridge.original_model),
        lambda bridge: [p.requires_grad for p in bridge.parameters()],
    ),
    "uncompiled": (lambda bridge: uncompiled(), lambda bridge: stance()),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_settings_end_with_the_last_context(name: str) -> None:
    model = llama().train()
    model.set_attn_implementation("eager")
    bridge = ml.wrap(model)
    make, look = CONTEXTS[name]
    before = look(bridge)
    first, second = make(bridge), make(bridge)
    first.__enter__()
    inside = look(bridge)
    assert inside != before
    second.__enter__()
    first.__exit__(None, None, None)
    assert look(bridge) == inside
    second.__exit__(None, None, None)
    assert look(bridge) == before


def test_another_stance_that_was_set_meanwhile_stays() -> None:
    outer = torch.compiler.set_stance("eager_on_recompile")
    context = uncompiled()
    context.__enter__()
    outer.__exit__(None, None, None)
    context.__exit__(None, None, None)
    assert stance() == "default"


def test_another_threads_ablation_does_not_end_this_one() -> None:
    other, model = llama(), torch.compile(build("LlamaForCausalLM", **TEXT), backend="eager")
    neurons = ml.NeuronSet(
        [(layer, n) for layer in (0, 1) for n in range(30)], layers=2, neurons=48
    )
    with ml.ablate(other, neurons):
        wanted = logits(other)
    intact, opened, leave = logits(model), threading.Event(), threading.Event()

    def first() -> None:
        with ml.ablate(other, neurons):
            opened.set()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    opened.wait()
    with ml.ablate(model, neurons):
        leave.set()
        thread.join()
        assert torch.equal(logits(model), wanted)
    assert stance() == "default"
    assert torch.equal(logits(model), intact)


@pytest.mark.parametrize("first", [0, 1])
def test_ablations_of_experts_end_in_any_order(first: int) -> None:
    model, _ = mixtral()
    units = model.config.intermediate_size * model.config.num_local_experts
    halves = [range(units // 2), range(units // 2, units)]
    sets = [
        ml.NeuronSet.of([(layer, n) for layer in (0, 1) for n in half], model) for half in halves
    ]
    intact = logits(model)
    with ml.ablate(model, sets[1 - first]):
        wanted = logits(model)
    contexts = [ml.ablate(model, one) for one in sets]
    for context in contexts:
        context.__enter__()
    contexts[first].__exit__(None, None, None)
    assert torch.equal(logits(model), wanted)
    contexts[1 - first].__exit__(None, None, None)
    assert torch.equal(logits(model), intact)
    assert not any("forward" in vars(module) for module in model.modules())


def test_experts_of_a_model_that_is_wrapped_and_unwrapped_inside() -> None:
    model, _ = mixtral()
    neurons = ml.NeuronSet.of([(0, 1), (1, 5)], model)
    intact = logits(model)
    with ml.ablate(model, neurons, "min"), ml.ablate(model, neurons):
        wanted = logits(model)
        bridge = ml.wrap(model)
        torch.testing.assert_close(logits(model), wanted)
    _, cache = bridge.run_with_cache(IDS)
    assert "blocks.1.mlp.act.hook_out" in cache
    with ml.ablate(bridge, neurons):
        torch.testing.assert_close(logits(model), wanted)
        ml.unwrap(bridge)
        torch.testing.assert_close(logits(model), wanted)
    assert torch.equal(logits(model), intact)


@pytest.mark.parametrize("first", [0, 1])
def test_features_are_the_models_own_after_the_last_context(first: int) -> None:
    model, inputs = llava()
    with torch.no_grad():
        intact = model(**inputs).logits
        contexts = [Features(model).kept(), Features(model).kept()]
        for context in contexts:
            context.__enter__()
        assert torch.equal(model(**inputs).logits, intact)
        contexts[first].__exit__(None, None, None)
        assert torch.equal(model(**inputs).logits, intact)
        contexts[1 - first].__exit__(None, None, None)
        # Kept features would be those of the weights before.
        next(model.model.vision_tower.parameters()).mul_(2)
        assert not torch.equal(model(**inputs).logits, intact)


def test_equal_ablations_are_noted_apart() -> None:
    model = llama()
    contexts = [noted(model, {"a": 1}), noted(model, {"b": 1}), noted(model, {"a": 1})]
    for context in contexts:
        context.__enter__()
    contexts[2].__exit__(None, None, None)
    assert active(model) == [{"a": 1}, {"b": 1}]
    for context in contexts[:2]:
        context.__exit__(None, None, None)
    assert active(model) == []


def test_threads_see_their_own_passes() -> None:
    """Which tokens are real and which are images is known by thread."""
    model = build("LlamaForCausalLM", **TEXT)
    model.modality_layout = ModalityLayout({"image": 90})
    some = ml.NeuronSet([(layer, n) for layer in (0, 1) for n in range(30)], layers=2, neurons=48)
    torch.manual_seed(0)
    passes = [torch.randint(88, 92, (2, 6 + pos)) for pos in range(4)]
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(passes[number]).logits, wanted[number]):
                    wrong.append(number)

    with ml.ablate(model, some, "min", at="image"), torch.no_grad():
        wanted = [model(ids).logits for ids in passes]
        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
