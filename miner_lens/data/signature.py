"""What tells one item of the data, or one setting, from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MOST = 65_536  # about so many elements of an array, or bytes of a picture, are hashed


def item_signature(item: Any) -> int:
    """A number of 64 bits that tells one item of the data from another.

    It covers texts, labels and media (files by name and size, which opens none of them), or the
    model inputs and masks of a prepared pair.
    """
    text = json.dumps(described(item), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def described(value: Any) -> Any:
    """A value as JSON can hold it: of arrays and pictures a hash, of functions their names.

    Example:
        >>> described({"k": 3, "function": len})
        {'k': 3, 'function': 'builtins.len'}
    """
    if value is None or isinstance(value, str | int | float | bool):
        return _file(value) if isinstance(value, str) else value
    if isinstance(value, Path):
        return _file(str(value))
    if isinstance(value, Image.Image):
        return _picture(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _array(torch.as_tensor(value))
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(described(one), sort_keys=True) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {one.name: described(getattr(value, one.name)) for one in fields(value)}
        return {type(value).__qualname__: parts}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _file(text: str) -> Any:
    """A path by the file's name and size, so that data may move; any other text as it is."""
    if len(text) > 1_000 or "\n" in text:
        return text
    try:
        return [Path(text).name, Path(text).stat().st_size] if Path(text).is_file() else text
    except (OSError, ValueError):  # such as a null character
        return text


def _picture(image: Image.Image) -> Any:
    name = getattr(image, "filename", "")
    if name and getattr(image, "fp", None) is not None:  # of a file that is not decoded yet
        return [_file(str(name)), *image.size]
    return [image.mode, *image.size, hashlib.sha256(_some(image.tobytes())).hexdigest()]


def _array(values: Tensor) -> Any:
    some = _some(values.detach().flatten()).cpu().contiguous()
    content = some.view(torch.uint8) if some.numel() else some
    return [str(values.dtype), *values.shape, hashlib.sha256(bytes(content.numpy())).hexdigest()]


def _some(many: Any) -> Any:
    # An odd step, which is hardly ever a multiple of a row's length.
    return many[:: len(many) // MOST | 1]
