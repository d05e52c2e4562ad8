"""Neurons as users have them: pairs, arrays, tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor


def as_pairs(pairs: Any) -> Int64[Tensor, "pair 2"]:
    """Layer and neuron of each pair, from pairs, an integer array [n, 2] or a DataFrame of both.

    Raises:
        ValueError: They are no pairs of whole numbers.

    Example:
        >>> as_pairs({(0, 3)})
        tensor([[0, 3]])
    """
    if hasattr(pairs, "columns"):
        if set(pairs.columns) != {"layer", "neuron"}:
            raise ValueError(
                "A table of neurons must have the columns layer and neuron, of one site, not "
                f"{', '.join(map(str, pairs.columns))}: give table[['layer', 'neuron']]."
            )
        pairs = np.array(pairs[["layer", "neuron"]])
    try:
        if not hasattr(pairs, "shape"):
            pairs = list(pairs)
        index = torch.as_tensor(pairs).detach().cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Neurons must be pairs (layer, neuron) of ints; got {pairs!r:.100}."
        ) from error
    if index.numel() == 0:
        return torch.empty(0, 2, dtype=torch.int64)
    no_number = index.dtype == torch.bool or index.is_complex() or index.is_floating_point()
    if index.ndim != 2 or index.shape[1] != 2 or no_number:
        raise ValueError(
            f"Neurons must be pairs (layer, neuron) of ints; got an array of shape "
            f"{list(index.shape)} and type {index.dtype}."
        )
    return index.to(torch.int64)
