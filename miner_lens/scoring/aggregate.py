"""Stage 3: what scores of several runs are together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def mix(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Weighted mean in fp64, 0 where all weights are 0."""
    total = sum((weight.double() for weight in weights), torch.tensor(0.0)).clamp(min=1)
    return sum(
        (
            tensor.double() * (weight / total).to(tensor.device)
            for tensor, weight in zip(tensors, weights, strict=True)
        ),
        torch.tensor(0.0, device=tensors[0].device),
    ).float()


def merge_info(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Both, with a sorted list of the different values where they differ."""
    merged = {**a, **b}
    for key in a.keys() & b.keys():
        if a[key] != b[key]:
            both = [value for one in (a[key], b[key]) for value in _as_list(one)]
            merged[key] = [json.loads(text) for text in sorted({json.dumps(v) for v in both})]
    return merged


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
