"""Neurons drawn by chance."""

from __future__ import annotations

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
