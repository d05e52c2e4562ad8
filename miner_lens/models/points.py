"""Hook points by what passes through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miner_lens.models import sites
from miner_lens.models.inside import hf_model_of


@dataclass(frozen=True)
class Point:
    """A TransformerLens hook point, and where in the model it is.

    Attributes:
        name: TransformerLens's name of it.
        layer: The layer, from 0.
        site: `"llm"` or the tower that it is in.
    """

    name: str
    layer: int
    site: str = "llm"


def activation_points(model: Any, site: str = "llm") -> list[Point]:
    """Where each layer's X is read, the output of its MLP's activation function: [... neuron].

    Raises:
        ValueError: The model has no such site, or no neurons there.
    """
    place = sites.find(hf_model_of(model), site)
    layers = range(len(place.mlps(hf_model_of(model))))
    return [Point(place.activation_point(layer), layer, site) for layer in layers]


def residual_points(model: Any) -> list[Point]:
    """Where the residual stream leaves each layer of the decoder: [sample pos d_model]."""
    return [Point(f"blocks.{layer}.hook_out", layer) for layer in range(len(model.blocks))]


def pattern_points(model: Any) -> list[Point]:
    """Where each layer's attention pattern is read: [sample head query key].

    Reading it has the layer compute the pattern, with the memory that takes.
    """
    return [Point(f"blocks.{layer}.attn.hook_pattern", layer) for layer in range(len(model.blocks))]
