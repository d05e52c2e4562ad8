"""Hooks that last as long as a context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ContextHook:
    """A hook that knows whether it was called, and that no copy of the model has.

    Attributes:
        function: What it does.
        applies: Whether it does anything now.
    """

    def __init__(
        self, function: Callable[..., Any], applies: Callable[[], bool] = lambda: True
    ) -> None:
        self.function, self.applies = function, applies
        self.called = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What torch does of any hook."""
        if not self.applies():
            return None
        self.called = True
        return self.function(*args, **kwargs)

    def __reduce__(self) -> Any:
        # The context closes for this model alone, so a copy would keep the hook for ever.
        return _inert, ()


def _inert() -> Callable[..., None]:
    return do_nothing


def do_nothing(*_: Any, **__: Any) -> None:
    """A hook without effect, which a copy of the model has in the place of another."""
