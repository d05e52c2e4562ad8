"""Neurons drawn by chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor


def random(layers: int, neurons: int, k: int, seed: int = 0) -> Bool[Tensor, "layer neuron"]:
    """`k` neurons drawn without replacement, the same for the same seed on every machine.

    The published code draws with replacement, so it gets fewer than `k` different neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(layers * neurons, dtype=torch.bool)
    chosen[torch.randperm(layers * neurons, generator=generator)[:k]] = True
    return chosen.view(layers, neurons)


def random_in_layers(
    counts: Sequence[int], neurons: int, seed: int = 0
) -> Bool[Tensor, "layer neuron"]:
    """`counts[layer]` of each layer's `neurons`, drawn without replacement, by one seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(counts), neurons, dtype=torch.bool)
    for row, count in zip(chosen, counts, strict=True):
        row[torch.randperm(neurons, generator=generator)[:count]] = True
    return chosen
