"""What an item of the data may be: a sample, or a prepared pair of model inputs and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from miner_lens.data.sample import Sample

NOT_INPUTS = {"labels", "use_cache", "cache", "past_key_values", "logits_to_keep", "return_dict"}


def item_of(given: Any) -> Any:
    """An item of the data; a mapping with messages, such as a table's row, is a sample."""
    return Sample.of(given) if isinstance(given, Mapping) and "messages" in given else given


def prepared_pair(item: Any, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model inputs and masks of a pair; token ids are called `input_ids`.

    What only asks for a loss, a cache or more logits is left out.

    Raises:
        ValueError: It is no such pair, or masks do not fit the inputs; the number names it.
    """
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise ValueError(
            "Data must be Samples or pairs (model_inputs, masks); item "
            f"{number} is {type(item).__name__}."
        )
    inputs, masks = (dict(part) for part in item)
    if "input" in inputs:
        inputs["input_ids"] = inputs.pop("input")
    for name in NOT_INPUTS & inputs.keys():
        del inputs[name]
    if "input_ids" not in inputs:
        raise ValueError(f"Item {number}: the model inputs have no input_ids.")
    if not masks:
        raise ValueError(f"Item {number}: masks must name at least one modality.")
    shape, real = inputs["input_ids"].shape, inputs.get("attention_mask")
    if real is not None and real.shape != shape:
        raise ValueError(
            f"Item {number}: attention_mask must be of shape {tuple(shape)} like input_ids, not "
            f"{tuple(real.shape)}, from which it cannot be read which tokens are padding."
        )
    for modality, mask in masks.items():
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"Item {number}: the mask of {modality!r} must be a boolean tensor of shape "
                f"{tuple(shape)} like input_ids, not {mask.dtype} of shape {tuple(mask.shape)}."
            )
        if real is not None and bool((mask & ~real.to(mask.device, torch.bool)).any()):
            raise ValueError(f"Item {number}: the mask of {modality!r} marks padding as well.")
    return inputs, masks
