"""LAPE against the published code's numbers, and against a naive twin."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import miner_lens as ml
from miner_lens.scoring import lape
from tests.reference import load


@pytest.mark.parametrize("number", [0, 1])
def test_the_published_sets(number: int) -> None:
    data = load(f"lape_{number}.npz")
    names = [name for name in sorted(data) if name.startswith("domain")]
    counts = ml.DomainCounts(
        torch.from_numpy(data["over_zero"]), torch.from_numpy(data["n_tokens"]), names
    )
    chosen = counts.select()
    assert list(chosen) == names
    for name in names:
        assert set(chosen[name]) == {tuple(row) for row in data[name].tolist()}, name
        assert len(chosen[name]) > 0


def twin(over_zero: Any, tokens: Any, top: float, filter_: float, bar: float) -> list[set[Any]]:
    """From the definition, with lists; ties go to the first."""
    layers, neurons, domains = len(over_zero), len(over_zero[0]), len(tokens)
    cells = [(layer, n) for layer in range(layers) for n in range(neurons)]
    share = {
        (layer, n): [
            float(torch.tensor(over_zero[layer][n][d]) / tokens[d]) for d in range(domains)
        ]
        for layer, n in cells
    }
    every = sorted(one for some in share.values() for one in some)
    least, most = (every[round(len(every) * rate) - 1] for rate in (filter_, bar))

    def spread(some: list[float]) -> float:
        scaled = [one / sum(some) for one in some] if sum(some) else []
        return -sum(one * math.log(one) for one in scaled if one)

    ranked = sorted(cells, key=lambda c: spread(share[c]) if max(share[c]) > least else math.inf)
    taken = ranked[: round(len(cells) * top)]
    return [{c for c in taken if share[c][d] > most} for d in range(domains)]


@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from([0.05, 0.2, 0.5]))
def test_the_definition(seed: int, domains: int, top_rate: float) -> None:
    made = torch.Generator().manual_seed(seed)
    # So many tokens that entropies hardly ever are equal but for rounding.
    tokens = torch.randint(90_000, 99_999, (domains,), generator=made)
    over_zero = (torch.rand(3, 12, domains, generator=made) ** 3 * 90_000).long()
    found = lape.lape(over_zero, tokens, top_rate, 0.6, 0.7)
    expected = twin(over_zero.tolist(), tokens.tolist(), top_rate, 0.6, 0.7)
    assert [{(a, b) for a, b in mask.nonzero().tolist()} for mask in found] == expected


def test_entropy_of_one_and_of_all() -> None:
    shares = torch.tensor([[[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.2, 0.2, 0.2]]])
    expected = torch.tensor([[0.0, 0.0, math.log(3)]])
    torch.testing.assert_close(lape.entropy(shares), expected)


def test_neurons_that_are_never_active_are_not_selected() -> None:
    over_zero = torch.zeros(2, 20, 2, dtype=torch.long)
    over_zero[1, 3] = torch.tensor([5, 0])
    over_zero[0, 7] = torch.tensor([4, 5])
    mask = lape.lape(over_zero, torch.tensor([10, 10]), 0.05, 0.9, 0.9)
    assert mask.nonzero().tolist() == [[0, 0, 7], [0, 1, 3], [1, 0, 7]]
    constant = torch.full((2, 20, 2), 10)
    assert not lape.lape(constant, torch.tensor([10, 10]), 0.05).any()


def counts(domains: tuple[str, ...] = ("code", "prose"), seed: int = 0) -> ml.DomainCounts:
    made = torch.Generator().manual_seed(seed)
    over_zero = torch.randint(0, 50, (2, 30, len(domains)), generator=made)
    return ml.DomainCounts(over_zero, torch.full((len(domains),), 50), domains)


def test_counts_add_up() -> None:
    one, two = counts(), counts(("prose", "arithmetic"), 1)
    both = sum([one, two])
    assert isinstance(both, ml.DomainCounts)
    assert both.domains == ("code", "prose", "arithmetic")
    assert both.tokens.tolist() == [50, 100, 50]
    assert torch.equal(both.over_zero[..., 1], one.over_zero[..., 1] + two.over_zero[..., 0])
    with pytest.raises(ValueError, match="different models"):
        one + ml.DomainCounts(torch.zeros(1, 30, 2).long(), torch.ones(2).long(), ("a", "b"))


def test_files_and_tables(tmp_path: Path) -> None:
    one = counts()
    one.save(tmp_path / "counts.safetensors")
    loaded = ml.DomainCounts.load(tmp_path / "counts.safetensors")
    assert torch.equal(loaded.over_zero, one.over_zero)
    assert (loaded.domains, loaded.tokens.tolist()) == (one.domains, one.tokens.tolist())
    assert repr(loaded) == repr(one)
    assert "code" in repr(one)
    table = one.to_frame()
    row = table[(table["layer"] == 1) & (table["neuron"] == 4) & (table["domain"] == "prose")]
    assert row["over_zero"].item() == int(one.over_zero[1, 4, 1])
    assert torch.allclose(one.probabilities[1, 4, 1], one.over_zero[1, 4, 1] / 50)


def test_what_cannot_be() -> None:
    whole = torch.ones(1, 4, 2).long()
    tokens = torch.tensor([3, 3])
    with pytest.raises(ValueError, match="whole numbers"):
        ml.DomainCounts(whole.float(), tokens, ("a", "b"))
    with pytest.raises(ValueError, match=r"expected \[layer neuron domain\]"):
        ml.DomainCounts(whole, tokens, ("a",))
    with pytest.raises(ValueError, match="named twice"):
        ml.DomainCounts(whole, tokens, ("a", "a"))
    with pytest.raises(ValueError, match="more often than"):
        ml.DomainCounts(whole * 4, tokens, ("a", "b"))
    with pytest.raises(ValueError, match="'b' has no tokens"):
        ml.DomainCounts(whole * 0, torch.tensor([3, 0]), ("a", "b")).select()
    with pytest.raises(ValueError, match="one domain among several"):
        ml.DomainCounts(whole[..., :1], tokens[:1], ("a",)).select()
    with pytest.raises(ValueError, match="Domain 1 has no token"):
        lape.lape(whole, torch.tensor([3, 0]))
    for rates in ({"top_rate": 0.0}, {"filter_rate": 1.5}, {"bar_ratio": -1.0}):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            ml.DomainCounts(whole, tokens, ("a", "b")).select(**rates)
    with pytest.raises(ValueError, match="of 4 neurons is none"):
        ml.DomainCounts(whole, tokens, ("a", "b")).select(0.01)
    with pytest.raises(ValueError, match="is none of them"):
        ml.DomainCounts(whole, tokens, ("a", "b")).select(0.5, 0.01)
