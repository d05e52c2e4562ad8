"""Values that a function reads from outside itself."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any

from miner_lens.installed import is_installed

_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_CLOSED_OVER = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


def values_read(function: FunctionType, with_globals: bool = True) -> dict[str, Any]:
    """Look up the globals and closed-over variables that a function reads.

    Of an object of which only an attribute is read, it is the attribute: `settings.scale` is a
    number, whatever else is in `settings`. Attributes of installed modules and classes are not
    looked up, nor are built-in names.

    Args:
        function: The function; those defined within it are read too.
        with_globals: Whether to look up its globals and imports too.

    Returns:
        The values by dotted name.

    Example:
        >>> from types import SimpleNamespace
        >>> settings = SimpleNamespace(scale=2.0)
        >>> values_read(lambda x: x * settings.scale)
        {'settings.scale': 2.0}
    """
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed_over = {}
    for name, cell in cells:
        with suppress(ValueError):  # it is empty yet
            closed_over[name] = cell.cell_contents
    found = {}
    for operation, names in _loads(function.__code__):
        if not with_globals and operation not in _CLOSED_OVER:
            continue
        scope = closed_over if operation in _CLOSED_OVER else function.__globals__
        if operation == "IMPORT_NAME":
            found[names[0]] = ModuleType(names[0])
        elif names[0] in scope:
            depth, value = _attribute(scope[names[0]], names[1:])
            found[".".join(names[: depth + 1])] = value
    return found


def _loads(code: CodeType) -> Iterator[tuple[str, list[str]]]:
    """The operations that read a name, each with it and the attributes that are read at once."""
    operation, names = "", list[str]()
    for instruction in dis.get_instructions(code):
        if names and instruction.opname in _ATTRIBUTE:
            names.append(instruction.argval)
            continue
        if names and instruction.opname != "STORE_ATTR":  # it writes to what it has named
            yield operation, names
        reads = instruction.opname in (*_GLOBAL, *_CLOSED_OVER, "IMPORT_NAME")
        operation, names = instruction.opname, [instruction.argval] if reads else []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _loads(constant)


def _attribute(value: Any, names: list[str]) -> tuple[int, Any]:
    """Follow attributes as far as they are there and the user's own; also return how far."""
    for depth, name in enumerate(names):
        if is_library(value):
            return depth, value
        try:
            value = getattr(value, name)
        except Exception:
            return depth, value
    return len(names), value


def is_library(value: Any) -> bool:
    """Tell a module or class of an installed package from the user's own and from other values."""
    if isinstance(value, ModuleType):
        return is_installed(value.__name__)
    return isinstance(value, type) and is_installed(value.__module__)
