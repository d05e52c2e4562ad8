"""Samples that were prepared by themselves, put together as the processor would have made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

MASK, PER_TOKEN = "attention_mask", ("pos",)

Kinds = dict[str, tuple[Any, ...]]


def kinds(inputs: Inputs) -> Kinds:
    """By name, what must be alike in samples that are put together."""
    shape = inputs["input_ids"].shape
    found: Kinds = {MASK: PER_TOKEN}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found[name] = PER_TOKEN if value.shape == shape else (value.dtype, *value.shape[1:])
        else:
            found[name] = (type(value),)
    return found


def fit(one: Kinds, two: Kinds) -> bool:
    """Whether samples of these kinds can be put together.

    What there is for each token must be in all; what there is for each medium need not.
    """
    return all(
        one[name] == two[name] if name in one and name in two else kind != PER_TOKEN
        for name, kind in (one | two).items()
    )


def collate(apart: Sequence[Inputs], pad: int) -> Inputs:
    """One batch of samples that were prepared by themselves, as the processor would make it.

    What there is for each token is padded on the left; what there is for each medium is laid end
    to end. There always is an attention mask, also where the processor makes none.

    Args:
        apart: Model inputs of one sample each, which fit one another.
        pad: The token id to pad with.
    """
    longest = max(inputs["input_ids"].shape[1] for inputs in apart)
    apart = [masked(inputs) for inputs in apart]
    together: Inputs = {}
    for name in dict.fromkeys(name for inputs in apart for name in inputs):
        values = [inputs[name] for inputs in apart if name in inputs]
        if not isinstance(values[0], Tensor):
            together[name] = [one for value in values for one in value]
            continue
        if values[0].shape == apart[0]["input_ids"].shape:
            fill = pad if name == "input_ids" else 0
            values = [
                torch.nn.functional.pad(v, (longest - v.shape[1], 0), value=fill) for v in values
            ]
        together[name] = torch.cat(values)
    return together


def brings_media(inputs: Mapping[str, Any]) -> bool:
    """Return True if there are media, or what an encoder made of them, among model inputs."""
    return any(
        value.is_floating_point() if isinstance(value, Tensor) else bool(value)
        for name, value in inputs.items()
        if name not in ("attention_mask", "inputs_embeds")
        and isinstance(value, Tensor | Mapping | Sequence)
        and not isinstance(value, str)
    )


def masked(inputs: Inputs) -> Inputs:
    """Return model inputs with an attention mask, which says that nothing is padding if new."""
    return inputs if MASK in inputs else inputs | {MASK: torch.ones_like(inputs["input_ids"])}
