"""How far attn_k and attn_q can be from the mean, given the largest attention within a modality.

docs/method.md derives both bounds. They are pure functions of tensors, elementwise.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def moved_weight(
    tokens: Float[Tensor, "*shape"], largest: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Bound on the share of weight that the second softmax can move away from equal weights.

    Divided by the number of tokens, the weights that attn_k and attn_q give to them add up to 1.
    This bounds their total variation distance from equal ones, which is half the sum of absolute
    differences. It is of the order of 1 / tokens, and at most tanh(largest / 4).

    Args:
        tokens: Number of tokens in S.
        largest: The largest attention probability in P[S, S], in [0, 1].

    Example:
        >>> moved_weight(torch.tensor([16.0, 256.0, 1000.0]), torch.tensor([1.0, 0.5, 0.5]))
        tensor([0.0909, 0.0050, 0.0013])
    """
    count = tokens.clamp(min=1)
    gain = largest.expm1()
    peak = count / ((largest / 2).exp() + 1)  # so many large entries move most
    large = torch.minimum(1 / largest, peak)  # and a row that adds up to 1 has no more than this
    moved = large * gain * (count - large) / (count * (count + large * gain))
    return torch.where(tokens > 1, moved, 0.0)


def score_bound(
    moved: Float[Tensor, "*shape"],
    widest: Float[Tensor, "*shape"],
    spread: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """Bound on the distance of a normalised attention score from the normalised mean.

    Args:
        moved: The share of weight that is moved away from equal weights, or a bound on it.
        widest: The largest range over S that the X of any neuron of the layer has.
        spread: The range over the layer's neurons that their means over S have.

    Returns:
        A number in [0, 1]; 1 says nothing, as all scores lie in [0, 1].

    Example:
        >>> score_bound(*torch.tensor([[0.005, 0.1], [4.0, 4.0], [1.0, 1.0]]).unbind())
        tensor([0.0417, 1.0000])
    """
    error = 2 * moved * widest
    bound = torch.where(error < spread, error / (spread - error), 1.0).clamp(max=1)
    return torch.where(error == 0, 0.0, bound)
