"""Calls of a module, counted without a hook, which a checkpoint would count for the experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from miner_lens.models.structure import plain


@contextmanager
def calls_of(
    module: Any, before: Callable[[list[tuple[Any, Any]]], None] | None = None
) -> Iterator[list[tuple[Any, Any]]]:
    """The arguments of each call, while the context is open.

    Args:
        module: A module of Hugging Face's, or the component around it.
        before: Is given the calls as one begins.
    """
    inner, seen = plain(module), []
    forward = inner.forward

    @wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        if before is not None:
            before(seen)
        return forward(*args, **kwargs)

    inner.forward = watched
    try:
        yield seen
    finally:
        del inner.forward
