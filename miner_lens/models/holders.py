"""Changes of what several contexts share, such as a setting of the process or of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any


@dataclass
class _Change:
    """A change that is in force, and how many contexts need it."""

    context: AbstractContextManager[Any]
    holders: int = 0


_changes: dict[Hashable, _Change] = {}
_lock = RLock()


@contextmanager
def held(key: Hashable, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Keep a change in force while the context is open: the first makes it, the last undoes it.

    Contexts may be closed in any order and by any thread. So the change must be none of a thread,
    as torch's gradient mode is.

    Args:
        key: Names the change, with the object that is changed: `("evaluation mode", hf_model)`.
        context: Makes the change when it is entered, and undoes it when it is left.

    Example:
        with held(("evaluation mode", hf_model), lambda: _evaluation_mode(hf_model)):
            hf_model(**inputs)
    """
    with _lock:
        change = _changes.get(key) or _Change(context())
        if not change.holders:
            change.context.__enter__()
            _changes[key] = change
        change.holders += 1
    try:
        yield
    finally:
        with _lock:
            change.holders -= 1
            if not change.holders:
                del _changes[key]
                change.context.__exit__(None, None, None)


def is_held(key: Hashable) -> bool:
    """Whether a change is in force."""
    return key in _changes
