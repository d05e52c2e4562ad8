"""A batch that holds the same samples several times over: how its parts follow from one copy's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

# How a result of two copies follows from that of one: it is the same, twice as many rows of a
# tensor, twice as many items of a list, or put together of parts of which that is true.
Growth = Literal["same", "rows", "items"] | list["Growth"] | dict[str, "Growth"]


def single(value: Any, copies: int) -> Any:
    """Of an argument that is so many equal parts, laid end to end, the first; else itself."""
    sized = isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim > 0)
    if not sized or not len(value) or len(value) % copies:
        return value
    first = value[: len(value) // copies]
    return first if equal(repeat(first, copies), value) else value


def repeat(value: Any, copies: int) -> Any:
    """So many copies of a tensor's rows, or of a list's items, laid end to end."""
    return torch.cat([value] * copies) if isinstance(value, Tensor) else value * copies


def growth(one: Any, two: Any) -> Growth | None:
    """How a result of two copies follows from that of one; None where it does not.

    Example:
        >>> growth({"rows": torch.ones(3), "layers": (torch.ones(2),)},
        ...        {"rows": torch.ones(6), "layers": (torch.ones(4),)})
        {'rows': 'rows', 'layers': ['rows']}
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape == two.shape:
            return "same" if _close(one, two) else None
        return "rows" if one.ndim and _close(torch.cat([one, one]), two) else None
    if isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        named = {name: growth(one[name], two[name]) for name in one}
        found = {name: part for name, part in named.items() if part is not None}
        return found if len(found) == len(named) else None
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if one and len(two) == 2 * len(one):
            items = zip((*one, *one), two, strict=True)
            return "items" if all(growth(*pair) == "same" for pair in items) else None
        if len(one) != len(two):
            return None
        parts = [part for pair in zip(one, two, strict=True) if (part := growth(*pair)) is not None]
        return parts if len(parts) == len(one) else None
    return "same" if equal(one, two) else None


def grown(one: Any, how: Growth, copies: int) -> Any:
    """The result of so many copies, by that of one."""
    if how == "same":
        return one
    if isinstance(how, str):
        return repeat(one, copies)
    if isinstance(how, dict):
        named = {name: grown(one[name], part, copies) for name, part in how.items()}
        return type(one)(**named) if type(one) is not dict else named
    return type(one)(grown(value, part, copies) for value, part in zip(one, how, strict=True))


def equal(one: Any, other: Any) -> bool:
    """Whether arguments are the same, tensors element by element."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
        return alike and one.device == other.device and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are the same but for rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    allowed = torch.finfo(one.dtype).eps ** 0.5 * float(one.abs().max())
    return bool((one - other).abs().max() <= allowed)
