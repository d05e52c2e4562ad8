"""The bounds of docs/method.md, against attention that tries to break them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miner_lens.scoring.attention_bound import moved_weight, score_bound
from tests.scoring.test_kernels import normalised

many = settings(max_examples=200, deadline=None)


def weights(attention: Tensor) -> tuple[Tensor, Tensor]:
    """What attn_k and attn_q give to each token, divided by the number of tokens."""
    tokens = len(attention)
    return attention.softmax(0).sum(1) / tokens, attention.softmax(1).sum(0) / tokens


def bound_of(attention: Tensor) -> Tensor:
    tokens = torch.tensor(len(attention), dtype=torch.float64)
    return moved_weight(tokens, attention.max())


@many
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.floats(0, 30),
    st.floats(0.05, 1),
    st.booleans(),
    st.booleans(),
)
def test_no_attention_breaks_the_bounds(
    seed: int, pos: int, sharpness: float, share: float, causal: bool, towards_few: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(2, pos, pos, generator=generator, dtype=torch.float64)
    if towards_few:  # all look at the same tokens, which moves most weight
        logits = logits[:, :1].expand(2, pos, pos)
    if causal:
        logits = logits.masked_fill(torch.ones(pos, pos).triu(1) > 0, -torch.inf)
    own = torch.rand(pos, generator=generator) < share
    own[0] = True
    attention = logits.softmax(-1).mean(0)[own][:, own]
    x = torch.randn(len(attention), 7, generator=generator, dtype=torch.float64).relu()
    mean = x.mean(0)
    bound = bound_of(attention)
    assert bound <= math.tanh(attention.max() / 4) + 1e-12
    for weight in weights(attention):
        moved = (weight - 1 / len(weight)).abs().sum() / 2
        assert moved <= bound + 1e-12
        widest = (x.amax(0) - x.amin(0)).max()
        spread = mean.max() - mean.min()
        allowed = score_bound(bound, widest, spread)
        assert ((normalised(weight @ x) - normalised(mean)).abs() <= allowed + 1e-9).all()
        assert score_bound(moved, widest, spread) <= allowed + 1e-12


@pytest.mark.parametrize(("tokens", "large"), [(16, 1), (16, 2), (40, 4), (9, 3), (300, 1)])
def test_the_bound_is_reached(tokens: int, large: int) -> None:
    """By queries that all look at the same few tokens."""
    attention = torch.zeros(tokens, tokens, dtype=torch.float64)
    attention[:, :large] = 1 / large
    _, weight = weights(attention)
    moved = (weight - 1 / tokens).abs().sum() / 2
    torch.testing.assert_close(bound_of(attention), moved)


@many
@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 5000))
def test_more_attention_allows_more_and_more_tokens_less(a: float, b: float, tokens: int) -> None:
    low, high = sorted((a, b))
    largest = torch.tensor([low, high], dtype=torch.float64)
    count = torch.full((2,), float(tokens), dtype=torch.float64)
    one, other = moved_weight(count, largest)
    assert 0 <= one <= other + 1e-12
    assert (moved_weight(2 * count, largest) <= torch.stack([one, other]) + 1e-12).all()
    assert other <= math.expm1(1) / tokens


def test_where_nothing_can_differ() -> None:
    one_token, no_attention = moved_weight(torch.tensor([1.0, 50.0]), torch.tensor([1.0, 0.0]))
    assert one_token == no_attention == 0
    zero, one = torch.zeros(1), torch.ones(1)
    assert score_bound(zero, one, zero) == 0
    assert score_bound(one, one, zero) == 1  # equal means say nothing of unequal weights
    assert score_bound(one, zero, zero) == 0
