"""Which ablations a model is under."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_active: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


@contextmanager
def noted(hf_model: Any, ablation: Any) -> Iterator[None]:
    """Count an ablation, described as JSON can hold it, as active while the context is open."""
    _active.setdefault(hf_model, []).append(ablation)
    try:
        yield
    finally:
        _active[hf_model].remove(ablation)


def active(hf_model: Any) -> list[Any]:
    """The ablations that a Hugging Face model is under, outermost first."""
    return list(_active.get(hf_model, ()))
