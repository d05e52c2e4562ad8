"""Which packages are installed, and what they add, which they name as entry points."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Hooks of ours only read, or say what they do, as ablations that are open are noted with the model.
OURS = ("miner_lens", "miner_lens_adapters")
# What these put onto modules by themselves is a part of the model; their versions tell it.
UPSTREAM = ("torch", "transformers", "transformer_lens", "accelerate", "peft")


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


def is_installed(module: str) -> bool:
    """Tell a module of Python or of an installed package from the user's own.

    Example:
        >>> is_installed("torch.nn"), is_installed("json"), is_installed("__main__")
        (True, True, False)
    """
    return _is_installed(module.partition(".")[0])


@cache
def _is_installed(package: str) -> bool:
    if package in (*OURS, *UPSTREAM) or package in sys.stdlib_module_names:
        return True
    if package == "__main__":  # also under a launcher that is installed
        return False
    try:
        spec = find_spec(package)
    except ValueError:  # a module that was not imported
        return False
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    folders = [set(Path(place).parts) for place in places if place is not None]
    return any(parts & {"site-packages", "dist-packages"} for parts in folders)
