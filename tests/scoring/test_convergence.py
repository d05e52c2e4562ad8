"""Measures of convergence, on clouds whose measures are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miner_lens.scoring import convergence

seeds = st.integers(0, 10_000)


def cloud(rows: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width))


def turn(width: int, seed: int) -> np.ndarray:
    return np.linalg.qr(cloud(width, width, seed))[0]


@given(seeds, st.integers(5, 30), st.integers(2, 12), st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_cka_is_1_of_itself_turned_scaled_and_shifted(
    seed: int, rows: int, width: int, scale: float
) -> None:
    x = cloud(rows, width, seed)
    assert convergence.cka(x, x) == pytest.approx(1)
    moved = scale * x @ turn(width, seed + 1) + 3.0
    assert convergence.cka(x, moved) == pytest.approx(1, abs=1e-8)
    y = cloud(rows, width + 1, seed + 2)
    one, other = convergence.cka(x, y), convergence.cka(y, moved)
    assert one == pytest.approx(other, abs=1e-8)


def test_cka_of_strangers_is_about_0_however_wide() -> None:
    found = [convergence.cka(cloud(40, 800, s), cloud(40, 800, s + 100)) for s in range(20)]
    assert abs(np.mean(found)) < 0.02
    assert convergence.cka(np.ones((5, 3)), cloud(5, 3, 0)) == 0


def test_cka_against_the_sum_over_quadruples() -> None:
    """Of a few rows, by the definition of the unbiased estimator (Song et al. 2012, equation 5)."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n, one = len(k), np.ones(len(k))
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return float((total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))

    x, y = cloud(9, 4, 1), cloud(9, 3, 2)
    y[:, 0] += x[:, 0]
    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert convergence.cka(x, y) == pytest.approx(expected)


@given(seeds, st.integers(3, 20), st.integers(2, 8), st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_distance_and_dimension_have_no_units(
    seed: int, rows: int, width: int, scale: float
) -> None:
    x, y, around = cloud(rows, width, seed), cloud(rows, width, seed + 1) + 1, turn(width, seed)
    before = convergence.centroid_distance(x, y)
    assert convergence.centroid_distance(scale * x @ around, scale * y @ around) == (
        pytest.approx(before)
    )
    size = convergence.effective_dimension(x)
    assert convergence.effective_dimension(scale * x @ around + 5) == pytest.approx(size)
    assert 1 - 1e-9 <= size <= min(rows - 1, width) + 1e-9
    assert convergence.centroid_distance(x, x) == 0


def test_constant_clouds() -> None:
    flat = np.ones((6, 3))
    assert convergence.centroid_distance(flat, flat) == 0
    assert convergence.effective_dimension(flat) == 0


def test_what_is_apart_is_told_apart_and_what_is_not_is_not() -> None:
    rng, samples = np.random.default_rng(0), np.repeat(np.arange(40), 4)
    labels = np.tile([0, 0, 1, 1], 40)
    x = rng.normal(size=(160, 60))
    assert 0.35 < convergence.held_out(x, labels, samples).mean() < 0.65
    x[labels == 1, 3] += 6
    assert convergence.held_out(x, labels, samples).mean() > 0.97


def test_the_jackknife_covers_a_mean() -> None:
    missed = 0
    for seed in range(100):
        x = cloud(60, 1, seed)[:, 0]
        found = convergence.jackknife(lambda some, x=x: float(x[some].mean()), 60)
        missed += not found.low <= 0 <= found.high
    assert missed <= 14  # 5 expected
    exact = convergence.jackknife(lambda some, x=x: float(x[some].mean()), 60, groups=60)
    assert exact.high - exact.value == pytest.approx(2.001 * x.std(ddof=1) / np.sqrt(60), rel=1e-3)


def test_too_little() -> None:
    with pytest.raises(ValueError, match="at least four samples"):
        convergence.cka(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="got 5 and 4"):
        convergence.cka(np.ones((5, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="needs at least two"):
        convergence.jackknife(lambda some: 0.0, 1)
    with pytest.raises(ValueError, match="at least two samples"):
        convergence.held_out(np.ones((3, 2)), np.array([0, 1, 0]), np.zeros(3, dtype=int))
