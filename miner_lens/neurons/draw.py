"""Neurons drawn by chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor


def random(
    exists: Bool[Tensor, "layer neuron"], k: int, seed: int = 0
) -> Bool[Tensor, "layer neuron"]:
    """`k` of the neurons that exist, drawn without replacement, by a seed as on every machine.

    The published code draws with replacement, so it gets fewer than `k` different neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    total = int(exists.sum())
    drawn = torch.zeros(total, dtype=torch.bool)
    drawn[torch.randperm(total, generator=generator)[:k]] = True
    return torch.zeros_like(exists).masked_scatter(exists, drawn)


def random_in_layers(
    counts: Sequence[int], exists: Bool[Tensor, "layer neuron"], seed: int = 0
) -> Bool[Tensor, "layer neuron"]:
    """`counts[layer]` of each layer's neurons, drawn without replacement, by one seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros_like(exists)
    widths = exists.sum(1).tolist()
    for row, width, count in zip(chosen, widths, counts, strict=True):
        row[torch.randperm(width, generator=generator)[:count]] = True
    return chosen
