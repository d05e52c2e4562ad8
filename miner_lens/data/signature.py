"""What tells one item of the data, or one setting, from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
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


def described(value: Any, fully: bool = False) -> Any:
    """Describe a value as JSON can hold it.

    Arrays and pictures are hashed; so are functions, with what they are made with. Of other objects
    there is only the name of their class.

    Args:
        value: The value.
        fully: Refuse what two different values could have in common.

    Raises:
        ValueError: There is such an object in it.

    Example:
        >>> described({"k": 3, "function": len})
        {'k': 3, 'function': 'builtins.len'}
        >>> described(lambda x: 2 * x) == described(lambda x: 3 * x)
        False
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
        return _array(torch.as_tensor(value), fully)
    if isinstance(value, Mapping):
        return {str(key): described(one, fully) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [described(one, fully) for one in value]
    if isinstance(value, torch.dtype | torch.device | ModuleType):
        return getattr(value, "__name__", str(value))
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(described(one, fully), sort_keys=True) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {one.name: described(getattr(value, one.name), fully) for one in fields(value)}
        return {type(value).__qualname__: parts}
    if isinstance(value, partial):
        return ["partial", described([value.func, value.args, value.keywords], fully)]
    if isinstance(value, MethodType):
        return [described(value.__func__, fully), described(value.__self__, fully)]
    if isinstance(value, FunctionType):
        return [f"{value.__module__}.{value.__qualname__}", _function(value, fully)]
    named = value if hasattr(value, "__qualname__") else type(value)
    if fully and named is not value:
        raise ValueError(f"two objects of {named.__module__}.{named.__qualname__} look alike")
    return f"{named.__module__}.{named.__qualname__}"


def _function(
    function: FunctionType, fully: bool = False, around: tuple[FunctionType, ...] = ()
) -> str:
    """Return a hash of a function's code, with the values that it has been given and looks up."""
    around = (*around, function)
    given: list[Any] = [function.__defaults__, function.__kwdefaults__]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty yet
            given.append(cell.cell_contents)
    looked_up = [function.__globals__.get(name) for name in _names(function.__code__)]
    # Of what it looks up: values, and functions beside it. Packages are known by their versions.
    values = [one for one in looked_up if isinstance(one, int | float | str | Tensor | np.ndarray)]
    beside = [
        _function(one, around=around)
        for one in looked_up
        if isinstance(one, FunctionType) and one not in around
        if one.__module__ == function.__module__
    ]
    given = [None if any(one is f for f in around) else described(one, fully) for one in given]
    text = json.dumps(
        [_code(function.__code__), given, described(values, fully), beside], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _names(code: CodeType) -> list[str]:
    inner = (_names(one) for one in code.co_consts if isinstance(one, CodeType))
    return [*code.co_names, *chain.from_iterable(inner)]


def _code(code: CodeType) -> list[Any]:
    constants = [
        _code(one)
        if isinstance(one, CodeType)
        else described(repr(one) if one is ... or isinstance(one, complex) else one)
        for one in code.co_consts
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


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


def _array(values: Tensor, fully: bool) -> Any:
    flat = values.detach().flatten()
    some = (flat if fully else _some(flat)).cpu().contiguous()
    content = some.view(torch.uint8) if some.numel() else some
    return [str(values.dtype), *values.shape, hashlib.sha256(bytes(content.numpy())).hexdigest()]


def _some(many: Any) -> Any:
    # An odd step, which is hardly ever a multiple of a row's length.
    return many[:: len(many) // MOST | 1]
