"""How one modality's tokens lie to another's: do they reach out, do they stand at the ends?

Pure functions on tensors. Each takes several labellings of the same tokens at once: the true one,
and those of a null.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

TAIL = 0.1  # how much of a cloud is its arm
EDGE = 0.05  # how much of the text lies at each end of it


def probing(
    x: Float[Tensor, "token d_model"],
    own: Int[Tensor, "labelling own"],
    other: Int[Tensor, "labelling other"],
) -> Float[Tensor, " labelling"]:
    """Whether a cloud of tokens has an arm towards another cloud, from -1 to 1.

    Kelly's skewness of the tokens' places along the line from their centroid to the other's: how
    much further the tenth nearest to the other cloud lies from the median than the tenth furthest
    from it, over the distance of the two. Above 0 the cloud reaches out; at 0 it is even; below 0
    its arm points away. It does not depend on how far the clouds are apart.

    Args:
        x: The tokens.
        own: Places in `x` of the tokens that may reach out, for each labelling.
        other: Places of those that they may reach for.

    Example:
        >>> x = torch.tensor([[0.0], [0.0], [0.1], [4.0], [10.0]])
        >>> probing(x, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[4]])).round(decimals=2)
        tensor([0.9600], dtype=torch.float64)
    """
    centred = x.double() - x.double().mean(0)
    towards = _centroids(centred, other) - _centroids(centred, own)
    places = (towards @ centred.T).gather(1, own)
    quantiles = places.new_tensor([TAIL, 0.5, 1 - TAIL])
    low, middle, high = torch.quantile(places, quantiles, dim=1)
    length = high - low
    # Where all tokens lie at one place, rounding is no arm.
    flat = length <= 1e-9 * places.abs().amax(1).clamp(min=1e-300)
    return torch.where(flat, 0.0, (high + low - 2 * middle) / length.masked_fill(flat, 1.0))


def telomeres(
    x: Float[Tensor, "token d_model"],
    text: Int[Tensor, "labelling text"],
    special: Int[Tensor, "labelling special"],
) -> Float[Tensor, " labelling"]:
    """Whether special tokens stand at both ends of the text, from 0 to 1.

    The text's length is its tokens' first principal component; an end is what lies beyond the 5 %
    or the 95 % quantile of the text's own places on it. With a and b the shares of special tokens
    at the two ends, it is 2 min(a, b): 1 where half of them stand at each end, 0 where one end has
    none, and 0.1 for a large number of tokens that are spread as the text is.

    Args:
        x: The tokens.
        text: Places in `x` of the text tokens, for each labelling.
        special: Places of the special tokens.

    Example:
        >>> x = torch.tensor([[-2.0, 0.1], [0.0, 0.0], [2.0, 0.1], [3.0, 0.0], [-3.0, 0.0]])
        >>> telomeres(x, torch.tensor([[0, 1, 2]]), torch.tensor([[3, 4]]))
        tensor([1.], dtype=torch.float64)
    """
    centred = x.double() - x.double().mean(0)
    kernel = centred @ centred.T
    # [labelling text token]: of the text, around its own centroid.
    rows = kernel[text]
    rows = rows - rows.mean(1, keepdim=True)
    own = rows.gather(2, text[:, None].expand(-1, text.shape[1], -1))
    own = own - own.mean(2, keepdim=True)
    axis = torch.linalg.eigh(own).eigenvectors[..., -1]
    places = (axis[:, None] @ rows)[:, 0]
    edges = places.new_tensor([EDGE, 1 - EDGE])
    low, high = torch.quantile(places.gather(1, text), edges, dim=1)[..., None]
    there = places.gather(1, special)
    before, after = (there < low).double().mean(1), (there > high).double().mean(1)
    return 2 * torch.minimum(before, after)


def _centroids(
    x: Float[Tensor, "token d_model"], places: Int[Tensor, "labelling some"]
) -> Float[Tensor, "labelling d_model"]:
    """The mean of some tokens, for each labelling."""
    weights = x.new_zeros(len(places), len(x))
    weights.scatter_(1, places, 1 / places.shape[1])
    return weights @ x


def labellings(first: int, second: int, shuffles: int, seed: int) -> Int[Tensor, "labelling token"]:
    """The places of tokens of two kinds, first as they are, then shuffled between the two kinds.

    Example:
        >>> labellings(2, 1, 1, seed=0).shape
        torch.Size([2, 3])
    """
    lots = torch.Generator().manual_seed(seed)
    count = first + second
    drawn = [torch.randperm(count, generator=lots) for _ in range(shuffles)]
    return torch.stack([torch.arange(count), *drawn])
