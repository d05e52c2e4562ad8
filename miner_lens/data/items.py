"""What an item of the data may be: a sample, or a prepared pair of model inputs and masks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from miner_lens.data.sample import Sample


def item_of(given: Any) -> Any:
    """An item of the data; a mapping with messages, such as a table's row, is a sample."""
    return Sample.of(given) if isinstance(given, Mapping) and "messages" in given else given


def signature(item: Any) -> int:
    """A number of 64 bits that tells one item from another, without opening its media."""
    if isinstance(item, Sample):
        content = repr((item.id, [_words(message) for message in item.messages])).encode()
    elif isinstance(item, tuple | list) and item and isinstance(item[0], Mapping):
        ids = item[0].get("input_ids", item[0].get("input"))
        content = b"" if ids is None else bytes(ids.cpu().contiguous().numpy().tobytes())
    else:
        content = type(item).__name__.encode()  # refused when its turn comes
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def _words(message: Any) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return content if isinstance(content, str) else type(content).__name__
    return [p.get("text", p.get("type")) if isinstance(p, Mapping) else "" for p in content]


def prepared_pair(item: Any, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model inputs and masks of a pair; token ids are called `input_ids`.

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
    if "input_ids" not in inputs:
        raise ValueError(f"Item {number}: the model inputs have no input_ids.")
    if not masks:
        raise ValueError(f"Item {number}: masks must name at least one modality.")
    shape, real = inputs["input_ids"].shape, inputs.get("attention_mask")
    for modality, mask in masks.items():
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"Item {number}: the mask of {modality!r} must be a boolean tensor of shape "
                f"{tuple(shape)} like input_ids, not {mask.dtype} of shape {tuple(mask.shape)}."
            )
        if real is not None and bool((mask & ~real.to(mask.device, torch.bool)).any()):
            raise ValueError(f"Item {number}: the mask of {modality!r} marks padding as well.")
    return inputs, masks
