"""LAPE: which neurons are active in few domains, by the entropy of their activation probabilities.

Pure functions on tensors (Tang et al. 2024, arXiv 2402.16438; for domains of multimodal models
MMNeuron, Huo et al. 2024, arXiv 2406.11193). Where entropies are equal, the lowest layer and
neuron come first, so that a selection does not depend on the machine.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def probabilities(
    over_zero: Int[Tensor, "layer neuron domain"], tokens: Int[Tensor, " domain"]
) -> Float[Tensor, "layer neuron domain"]:
    """The share of each domain's tokens at which a neuron is positive, in float32 as published.

    Example:
        >>> probabilities(torch.tensor([[[1, 3]]]), torch.tensor([2, 4]))
        tensor([[[0.5000, 0.7500]]])
    """
    return over_zero / tokens


def entropy(shares: Float[Tensor, "layer neuron domain"]) -> Float[Tensor, "layer neuron"]:
    """Entropy, in nats, of a neuron's probabilities after they are scaled to sum to 1.

    It is 0 where a neuron is active in one domain alone, and log(domains) where it is active in all
    alike. A neuron that is active in none has 0 too, as published; `lape` never selects it unless
    nothing else is left.

    Example:
        >>> entropy(torch.tensor([[[0.5, 0.0], [0.2, 0.2]]]))
        tensor([[0.0000, 0.6931]])
    """
    scaled = (shares / shares.sum(-1, keepdim=True)).nan_to_num(0.0)
    spread: Tensor = torch.special.entr(scaled).sum(-1)
    return spread


def lape(
    over_zero: Int[Tensor, "layer neuron domain"],
    tokens: Int[Tensor, " domain"],
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    bar_ratio: float = 0.95,
) -> Bool[Tensor, "domain layer neuron"]:
    """Membership of each neuron in each domain's set, as published; a neuron may be in several.

    Neurons that in no domain exceed the `filter_rate` quantile of all probabilities are left out.
    Of the others the `top_rate` of all neurons with the lowest entropy are taken, and each is given
    to every domain in which its probability exceeds the `bar_ratio` quantile.

    Args:
        over_zero: How often each neuron was positive.
        tokens: How many tokens each domain had.
        top_rate: Share of all neurons to take.
        filter_rate: Quantile that a neuron must exceed in some domain.
        bar_ratio: Quantile that it must exceed in a domain to be given to it.

    Raises:
        ValueError: A rate lies outside (0, 1], or picks no neuron of so few; or a domain has no
            token.

    Example:
        >>> counts = torch.tensor([[[9, 0], [0, 8], [5, 5], [1, 1]]])
        >>> lape(counts, torch.tensor([10, 10]), 0.5, 0.5, 0.5)[:, 0].nonzero().tolist()
        [[0, 0], [1, 1]]
    """
    rates = {"top_rate": top_rate, "filter_rate": filter_rate, "bar_ratio": bar_ratio}
    for name, rate in rates.items():
        if not 0 < rate <= 1:
            raise ValueError(f"{name} must lie in (0, 1]; got {rate}.")
    if (tokens < 1).any():
        empty = int((tokens < 1).nonzero()[0])
        raise ValueError(f"Domain {empty} has no token, so no neuron has a probability there.")
    shares = probabilities(over_zero, tokens)
    found = entropy(shares)
    passed = (shares > _quantile(shares, filter_rate, "filter_rate")).any(-1)
    found = found.masked_fill(~passed, torch.inf)
    count = round(found.numel() * top_rate)
    if count < 1:
        raise ValueError(
            f"top_rate {top_rate} of {found.numel()} neurons is none; the smallest that picks one "
            f"is {0.51 / found.numel():.2g}."
        )
    # Not topk: it leaves open which of equal entropies it takes.
    lowest = found.flatten().sort(stable=True).indices[:count]
    chosen = torch.zeros(found.numel(), dtype=torch.bool, device=found.device)
    chosen[lowest] = True
    above = shares > _quantile(shares, bar_ratio, "bar_ratio")
    return (above & chosen.view(found.shape)[..., None]).permute(2, 0, 1)


def _quantile(
    shares: Float[Tensor, "layer neuron domain"], rate: float, name: str
) -> Float[Tensor, ""]:
    """The k-th smallest, k being the rate of all values, rounded as Python rounds."""
    place = round(shares.numel() * rate)
    if place < 1:
        raise ValueError(f"{name} {rate} of {shares.numel()} probabilities is none of them.")
    return shares.flatten().kthvalue(place).values
