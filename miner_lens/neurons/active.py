"""Which ablations a model is under."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_active: weakref.WeakKeyDictionary[Any, dict[object, Any]] = weakref.WeakKeyDictionary()


@contextmanager
def noted(hf_model: Any, ablation: Any) -> Iterator[None]:
    """Count an ablation, described as JSON can hold it, as active while the context is open."""
    key = object()  # of its own, as equal ones may be closed in any order
    _active.setdefault(hf_model, {})[key] = ablation
    try:
        yield
    finally:
        del _active[hf_model][key]


def active(hf_model: Any) -> list[Any]:
    """The ablations that a Hugging Face model is under, outermost first."""
    return list(_active.get(hf_model, {}).values())
