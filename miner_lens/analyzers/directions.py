"""What a neuron writes: its output direction, seen through the vocabulary and beside others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from miner_lens.analyzers.reading import Lens
from miner_lens.models.access import mlps
from miner_lens.models.fingerprint import has_weight
from miner_lens.models.forcing import tokenizer_of
from miner_lens.models.precision import full_precision

Word = tuple[str, float]


def output_direction(model: Any, layer: int, neuron: int) -> Float[Tensor, " d_model"]:
    """What a decoder neuron adds to the residual stream when X times the up projection is 1.

    It is the neuron's column of the down projection, in float32; of an expert's neuron, what it
    adds before the router's weight.

    Raises:
        ValueError: There is no such neuron, or the weights cannot be read.
    """
    downs = _down_weights(model)
    width = downs[layer if 0 <= layer < len(downs) else 0].shape[1]
    if not (0 <= layer < len(downs) and 0 <= neuron < width):
        raise ValueError(
            f"Neuron ({layer}, {neuron}) (layer, neuron) lies outside {len(downs)} layers x "
            f"{width} neurons; both count from 0."
        )
    return downs[layer][:, neuron].float()


def vocabulary_effect(
    model: Any, direction: Float[Tensor, " d_model"], k: int = 10
) -> tuple[list[Word], list[Word]]:
    """The tokens that a direction of the residual stream promotes and suppresses most.

    It is the logit lens on the direction (nostalgebraist 2020; for neurons Geva et al. 2021, arXiv
    2012.14913): the final norm and the head, less what they make of nothing, less the mean over the
    vocabulary. The direction is scaled to a root mean square of 1, so that numbers of different
    neurons compare. What later layers make of the direction it does not see.

    Args:
        model: A `TransformerBridge` with a tokenizer.
        direction: The direction.
        k: How many tokens of either kind.

    Returns:
        Tokens and logits, the largest first; and those with the smallest, the smallest first.
    """
    lens = Lens(model)
    if lens.norm is None or lens.head is None:
        raise ValueError("This model has no final norm or no head to look through.")
    weight = next(model.unembed.parameters())
    # Before the norm does, whose epsilon counts where a direction is short.
    scaled = direction * direction.square().mean().rsqrt()
    both = torch.stack([scaled, torch.zeros_like(scaled)]).to(weight.device, weight.dtype)
    with torch.no_grad():
        seen, nothing = lens.head(lens.norm(both[None]))[0].float()
    logits = seen - nothing
    logits = logits - logits.mean()
    decode = tokenizer_of(model).decode
    # A head may be longer than the vocabulary, padded to a multiple of 64.
    k = min(k, len(logits))
    found = []
    for largest in (True, False):
        values, ids = logits.topk(k, largest=largest)
        words = [decode([token]) for token in ids.tolist()]
        found.append(list(zip(words, values.tolist(), strict=True)))
    return found[0], found[1]


@full_precision()
def nearest_by_direction(
    model: Any, layer: int, neuron: int, k: int = 10
) -> list[tuple[int, int, float]]:
    """The decoder neurons whose output directions are most like a neuron's.

    Args:
        model: A `TransformerBridge` or a Hugging Face model.
        layer: The neuron's layer.
        neuron: Its place in the layer.
        k: How many.

    Returns:
        (layer, neuron, cosine) of each, the most alike first, of all layers, without itself.
    """
    own = normalize(output_direction(model, layer, neuron), dim=0)
    found: list[tuple[int, int, float]] = []
    for place, weight in enumerate(_down_weights(model)):
        cosines = own.to(weight.device) @ normalize(weight.float(), dim=0)
        if place == layer:
            cosines[neuron] = -torch.inf
        values, ids = cosines.topk(min(k, len(cosines)))
        rows = zip(ids.tolist(), values.tolist(), strict=True)
        found += [(place, one, value) for one, value in rows if value > -torch.inf]
    return sorted(found, key=lambda one: -one[2])[:k]


def _down_weights(model: Any) -> Sequence[Float[Tensor, "d_model neuron"]]:
    downs = [layer.down for layer in mlps(model)]
    for part in downs:
        if not has_weight(part) or part.weight.is_meta:
            raise ValueError(
                "Output directions are read off the weights of the down projections, which are "
                "quantized or offloaded here. Load the model whole, in a floating dtype."
            )
    # The experts of a layer have one direction after the other.
    return [part.weight.detach().flatten(1) for part in downs]
