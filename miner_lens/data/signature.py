"""What tells one item of the data, or one setting, from another."""

from __future__ import annotations

import hashlib
import json
import logging
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    EllipsisType,
    FunctionType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miner_lens.data.reads import is_library, values_read
from miner_lens.installed import is_installed

_METHODS = (FunctionType, classmethod, staticmethod, property)
# Functions that have no code in Python.
_NATIVE = (
    BuiltinFunctionType,
    MethodDescriptorType,
    MemberDescriptorType,
    WrapperDescriptorType,
    MethodWrapperType,
    np.ufunc,
)
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

    Arrays and pictures are hashed; so are functions, with what they are made with and what they
    read, be it in other modules. Of installed packages there are the names alone. Of other objects
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
    return _Describer(fully).of(value)


class _Describer:
    """Describes values, each function and class among them once.

    Attributes:
        fully: Refuse what two different values could have in common.
        seen: Functions and classes that are described already, or are being described.
        names: What the functions around read, down to what is being described.
    """

    def __init__(self, fully: bool) -> None:
        self.fully = fully
        self.seen: list[Any] = []
        self.names: list[str] = []

    def of(self, value: Any) -> Any:
        """Describe a value, as `described` does."""
        if value is None or isinstance(value, str | int | float | bool):
            return _file(value) if isinstance(value, str) else value
        if isinstance(value, Path):
            return _file(str(value))
        if isinstance(value, Image.Image):
            return _picture(value)
        if isinstance(value, bytes):
            return hashlib.sha256(value).hexdigest()
        if isinstance(value, Tensor | np.ndarray | np.generic):
            return _array(torch.as_tensor(value), self.fully)
        if isinstance(value, Mapping):
            return {str(key): self.of(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(one) for one in value]
        if isinstance(value, torch.device):
            return value.type  # ranks have devices of their own
        if isinstance(value, torch.dtype | complex | range | slice | EllipsisType):
            return str(value)
        if isinstance(value, re.Pattern):
            return [value.pattern, value.flags]
        if isinstance(value, set | frozenset):
            return sorted(json.dumps(self.of(one), sort_keys=True) for one in value)
        if isinstance(value, partial):
            return ["partial", self.of([value.func, value.args, value.keywords])]
        if isinstance(value, type | FunctionType):
            return self._definition(value)
        if isinstance(value, property):
            return self.of([value.fget, value.fset, value.fdel])
        return self._object(value)

    def _object(self, value: Any) -> Any:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if is_dataclass(value):
            parts = {one.name: self.of(getattr(value, one.name)) for one in fields(value)}
            return {kind.__qualname__: parts} | ({"class": self.of(kind)} if self.fully else {})
        if isinstance(value, Enum):
            return [self.of(kind), value.name]
        if isinstance(value, MethodType):
            return [self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, _NATIVE):
            own = getattr(value, "__self__", None)
            module = getattr(value, "__module__", None) or "builtins"
            named = f"{module}.{getattr(value, '__qualname__', value.__name__)}"
            return named if own is None or isinstance(own, ModuleType) else [named, self.of(own)]
        # Of lru_cache, classmethod and staticmethod.
        if kind.__module__ in ("functools", "builtins") and hasattr(value, "__wrapped__"):
            return [name, self.of(value.__wrapped__)]
        if is_library(value) or (isinstance(value, ModuleType) and not self.fully):
            return value.__name__
        if isinstance(value, logging.Logger):
            return [name, value.name]
        if isinstance(value, torch.no_grad | torch.enable_grad):
            return name
        if self.fully:
            alike = (
                f"the attributes of the module {value.__name__} may change"
                if isinstance(value, ModuleType)
                else f"two objects of {name} look alike"
            )
            read = f"it reads {', which reads '.join(self.names)}, and " if self.names else ""
            raise ValueError(read + alike)
        return name

    def _definition(self, value: Any) -> Any:
        """Describe a function or class: by its name, and by a hash of what the user wrote."""
        name = f"{value.__module__}.{value.__qualname__}"
        if is_library(value):
            return name
        for number, one in enumerate(self.seen):
            if one is value:
                return number
        self.seen.append(value)
        parts = self._class(value) if isinstance(value, type) else self._function(value)
        text = json.dumps(parts, sort_keys=True)
        return [name, hashlib.sha256(text.encode()).hexdigest()]

    def _function(self, function: FunctionType) -> Any:
        code = _code(function.__code__)
        of_library = is_installed(function.__globals__.get("__name__", ""))
        if of_library and _is_public(function):
            return [code]
        given = self.of([function.__defaults__, function.__kwdefaults__])
        read = {}
        for name, value in values_read(function, with_globals=not of_library).items():
            self.names.append(name)
            read[name] = self.of(value)
            self.names.pop()
        return [code, given, read]

    def _class(self, kind: type) -> Any:
        made = is_dataclass(kind)
        written = {
            name: value
            for name, value in vars(kind).items()
            if name != "_abc_impl"
            if not name.endswith("__") or isinstance(value, _METHODS)
            if not (made and isinstance(value, FunctionType) and _is_generated(value))
        }
        factories = [one.default_factory for one in fields(kind)] if made else []
        return self.of([kind.__bases__, written, [one for one in factories if one is not MISSING]])


def _is_public(function: FunctionType) -> bool:
    """Tell a function that an installed package has under its name from one made by a call."""
    module = function.__module__ or ""
    try:
        found = pkgutil.resolve_name(f"{module}:{function.__qualname__}")
    except (ImportError, AttributeError, ValueError):
        return False
    return is_installed(module) and found is function


def _is_generated(function: FunctionType) -> bool:
    return function.__code__.co_filename == "<string>"


def _code(code: CodeType) -> list[Any]:
    constants = [
        _code(one) if isinstance(one, CodeType) else described(one) for one in code.co_consts
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
