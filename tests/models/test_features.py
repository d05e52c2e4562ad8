"""Towers run once for passes over the same media, and every pass is what it would have been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.models.copies import equal
from miner_lens.models.features import Features
from miner_lens.models.sites import Tower, sites
from tests.families import Inputs
from tests.parts import FAMILIES


def counted(bridge: Any) -> list[str]:
    """The site of each call of a tower's first layer from now on."""
    calls: list[str] = []
    for name, site in sites(bridge.original_model).items():
        if isinstance(site, Tower):
            first = site.mlps(bridge.original_model)[0].activation
            first.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def logits(bridge: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found: Tensor = bridge.original_model(**inputs, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_towers_run_once_and_change_nothing(name: str) -> None:
    model, inputs = FAMILIES[name].make()
    bridge = ml.wrap(model)
    calls = counted(bridge)
    plain = logits(bridge, inputs)
    once = list(calls)
    some = {key: value.clone() for key, value in inputs.items()}  # equal, and not the same
    features = Features(model)
    neurons = ml.NeuronSet.of([(0, n) for n in range(24)], bridge)
    with ml.ablate(bridge, neurons):
        ablated = logits(bridge, inputs)
    calls.clear()
    with features.kept():
        first = logits(bridge, inputs)
    with ml.ablate(bridge, neurons), features.kept():
        second = logits(bridge, some)
    assert torch.equal(first, plain)
    assert torch.equal(second, ablated)
    assert not torch.equal(ablated, plain)
    assert calls == once
    # Several copies of the samples: after the first time, which shows what two copies give.
    many = {key: torch.cat([value] * 3) for key, value in inputs.items()}
    apart = logits(bridge, many)
    calls.clear()
    for seen in (2 * len(once), 0):
        with features.kept(3):
            together = logits(bridge, many)
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
        assert len(calls) <= seen
        calls.clear()
    # Nothing is left behind, and other media are looked at anew.
    logits(bridge, inputs)
    assert calls == once
    media = [
        key for key, value in inputs.items() if value.is_floating_point() and "mask" not in key
    ]
    other = {key: value * 1.5 if key in media else value for key, value in inputs.items()}
    with features.kept():
        kept = logits(bridge, other)
    assert torch.equal(kept, logits(bridge, other))


def test_arguments_are_equal_element_by_element() -> None:
    ones = torch.ones(2)
    same = [(ones, ones.clone()), ([1, {"a": ones}], [1, {"a": ones.clone()}]), (None, None)]
    other = [(ones, ones.double()), (ones, None), (ones, torch.ones(3)), ([1], [1, 2]), (1, 2)]
    assert all(equal(*pair) for pair in same)
    assert not any(equal(*pair) for pair in other)
    assert not equal({"a": 1}, {"b": 1})
