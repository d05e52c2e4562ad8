"""What installed packages add, which they name as entry points."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, TypeVar

T = TypeVar("T")


def find(what: str, name: str, own: Mapping[str, T], group: str, otherwise: str = "") -> T:
    """Something by its name: one of our own, or one that an installed package names in a group.

    Args:
        what: What it is, for the error.
        name: What is asked for.
        own: Those that are there without a package.
        group: Of entry points.
        otherwise: What else the error may advise than a package.

    Raises:
        ValueError: There is none of that name.

    Example:
        >>> find("builtin", "length", {"length": len}, "some.group") is len
        True
    """
    if name in own:
        return own[name]
    installed = _entries(group)
    if name not in installed:
        known = ", ".join(dict.fromkeys([*own, *installed]))
        raise ValueError(
            f"There is no {what} {name!r}; there are {known}. To add one, name a function in the "
            f"entry-point group {group!r}{otherwise}."
        )
    loaded: T = installed[name].load()
    return loaded


@cache
def described(group: str, architecture: str) -> Any:
    """What a package names in a group under a model's class name, loaded; None where none does.

    Looked up once, as going through all installed packages takes long.
    """
    installed = _entries(group)
    return installed[architecture].load() if architecture in installed else None


def _entries(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


# Looked up in files, and asked for by each run.
_version = cache(version)


def versions() -> dict[str, str]:
    """Of the packages that scores depend on."""
    packages = ("miner-lens", "transformer-lens", "transformers", "torch")
    return {package: _version(package) for package in packages}
