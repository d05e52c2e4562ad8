"""What installed packages say of model families, by entry point."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any


@cache
def described(group: str, architecture: str) -> Any:
    """What a package names in a group under a model's class name, loaded; None where none does.

    Looked up once, as going through all installed packages takes long.
    """
    for entry in entry_points(group=group, name=architecture):
        return entry.load()
    return None
