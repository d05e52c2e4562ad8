"""Ablations in rows of one batch are what each is in a batch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.neurons.ablation import PreparedAblation, opened, opened_in_rows
from miner_lens.neurons.neuron_set import NeuronSet
from tests.families import Inputs
from tests.parts import FAMILIES

FEW, MOST = 3, 21


def logits(bridge: Any, inputs: Inputs, copies: int = 1) -> Tensor:
    many = {name: torch.cat([value] * copies) for name, value in inputs.items()}
    found: Tensor = bridge.original_model(**many, use_cache=False).logits
    return found


def some(bridge: Any, count: int, seed: int) -> NeuronSet:
    nothing = NeuronSet.of([], bridge)
    chosen = NeuronSet.random(count * nothing.layers, nothing, seed)
    return NeuronSet.from_mask(chosen.mask, means=torch.randn(nothing.mask.shape))


def every_kind(bridge: Any, at: str) -> list[list[PreparedAblation]]:
    few, most = some(bridge, FEW, 0), some(bridge, MOST, 1)
    return [
        [PreparedAblation(bridge, few)],
        [],
        [PreparedAblation(bridge, most, value="mean")],
        [PreparedAblation(bridge, most, value="min")],
        [PreparedAblation(bridge, few, value=2.0, at=at)],
        [PreparedAblation(bridge, few, complement=True)],
        [PreparedAblation(bridge, few), PreparedAblation(bridge, most, value=0.5, at="prompt")],
    ]


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "qwen2_audio"])
def test_rows_are_as_batches_of_their_own(name: str) -> None:
    model, inputs = FAMILIES[name].make()
    bridge = ml.wrap(model)
    rows = len(inputs["input_ids"])
    with torch.no_grad():
        before = logits(bridge, inputs)
        ablations = every_kind(bridge, "audio" if "audio" in name else "image")
        apart = []
        for some_of_them in ablations:
            with opened(bridge, some_of_them):
                apart.append(logits(bridge, inputs))
        for _ in range(2):  # what is prepared once is opened twice
            with opened_in_rows(bridge, [(one, rows) for one in ablations]):
                together = logits(bridge, inputs, len(ablations))
            torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)
        assert torch.equal(logits(bridge, inputs), before)
    assert not torch.allclose(apart[0], apart[2])


def test_gradients_pass_through(vision: tuple[Any, Inputs]) -> None:
    bridge, inputs = vision
    ablations = every_kind(bridge, "image")
    weight = bridge.original_model.get_decoder().layers[0].mlp.gate_proj.weight

    def gradient(parts: Sequence[Any], copies: int) -> Tensor:
        with opened_in_rows(bridge, parts):
            loss = logits(bridge, inputs, copies).float().square().sum()
        (found,) = torch.autograd.grad(loss, weight)
        return found

    rows = len(inputs["input_ids"])
    together = gradient([(one, rows) for one in ablations], len(ablations))
    apart = sum(gradient([(one, rows)], 1) for one in ablations)
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5)


@pytest.fixture
def vision() -> tuple[Any, Inputs]:
    model, inputs = FAMILIES["qwen2_vl"].make()
    return ml.wrap(model), inputs


def test_refusals(vision: tuple[Any, Inputs]) -> None:
    bridge, inputs = vision
    off = PreparedAblation(bridge, some(bridge, FEW, 0))
    tower = PreparedAblation(bridge, NeuronSet.of([(0, 1)], bridge, site="vision"))
    with (
        pytest.raises(ValueError, match=r"'vision' cannot be switched off in some rows"),
        opened_in_rows(bridge, [([off], 1), ([tower], 1)]),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"rows of a batch of 9, but the MLP's .* gives \[3, "),
        opened_in_rows(bridge, [([off], 4), ([], 5)]),
    ):
        logits(bridge, inputs)
    with opened_in_rows(bridge, [([], 1), ([], 1)]):
        logits(bridge, inputs)
