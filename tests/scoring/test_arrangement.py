"""Probing and telomeres, on clouds that were laid out by hand, against naive twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miner_lens.scoring.arrangement import labellings, probing, telomeres

seeds = st.integers(0, 10_000)


def cloud(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width)))


def naive_probing(own: np.ndarray, other: np.ndarray) -> float:
    towards = other.mean(0) - own.mean(0)
    low, middle, high = np.quantile(own @ towards, [0.1, 0.5, 0.9])
    return float(((high - middle) - (middle - low)) / (high - low))


def naive_telomeres(text: np.ndarray, special: np.ndarray) -> float:
    axis = np.linalg.svd(text - text.mean(0))[2][0]
    low, high = np.quantile(text @ axis, [0.05, 0.95])
    places = special @ axis
    return float(2 * min((places < low).mean(), (places > high).mean()))


@given(seeds, st.integers(3, 20), st.integers(2, 12), st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_against_naive_twins(seed: int, first: int, second: int, width: int) -> None:
    x = cloud(first + second, width, seed) + 100
    some = labellings(first, second, 3, seed)
    assert torch.equal(some[0], torch.arange(first + second))
    assert torch.equal(some.sort(1).values, some[:1].expand(4, -1))
    probes = probing(x, some[:, :first], some[:, first:])
    ends = telomeres(x, some[:, :first], some[:, first:])
    for row, order in enumerate(some):
        own, other = x[order[:first]].numpy(), x[order[first:]].numpy()
        assert float(probes[row]) == pytest.approx(naive_probing(own, other), abs=1e-6)
        assert float(ends[row]) == pytest.approx(naive_telomeres(own, other), abs=1e-9)


def arm(towards: float) -> torch.Tensor:
    """40 tokens around 0, eight of them stretched along an axis, and 10 tokens of text on it."""
    x = 0.1 * cloud(50, 8, 0)
    x[32:40, 0] = torch.linspace(0, 3, 8) * towards
    x[40:, 0] += 10
    return x


def test_an_arm_points_towards_the_text_or_away() -> None:
    own, other = torch.arange(40)[None], torch.arange(40, 50)[None]
    assert probing(arm(1), own, other) > 0.8
    assert probing(arm(-1), own, other) < -0.8
    assert abs(probing(0.1 * cloud(50, 8, 1), own, other)) < 0.3
    # Further away, turned and scaled, it is the same arm.
    turn = torch.linalg.qr(cloud(8, 8, 2)).Q
    moved = arm(1) @ turn * 7 + 3
    torch.testing.assert_close(probing(moved, own, other), probing(arm(1), own, other))
    far = arm(1)
    far[40:, 0] += 100
    torch.testing.assert_close(
        probing(far, own, other), probing(arm(1), own, other), atol=0.02, rtol=0
    )


@pytest.mark.parametrize(
    ("places", "value"),
    [((-9, -8, 8, 9), 1.0), ((-9, 8, 9, 10), 0.5), ((7, 8, 9, 10), 0.0), ((-1, 0, 1, 2), 0.0)],
)
def test_special_tokens_stand_at_both_ends_or_not(places: tuple[int, ...], value: float) -> None:
    x = 0.01 * cloud(15, 6, 3)
    x[:11, 2] += torch.linspace(-5, 5, 11)
    x[11:, 2] += torch.tensor(places)
    assert telomeres(x, torch.arange(11)[None], torch.arange(11, 15)[None]).item() == value


def test_constant_tokens_are_neither() -> None:
    x = torch.full((9, 4), 0.1)
    own, other = torch.arange(6)[None], torch.arange(6, 9)[None]
    assert probing(x, own, other).item() == 0
    assert telomeres(x, own, other).item() == 0
