"""Contexts under gradient checkpointing, which computes layers again for the backward pass.

A layer is computed again under the contexts that it was first computed under, and with what they
knew of that pass, whatever was opened and closed since.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from miner_lens.models.holders import held
from miner_lens.models.hook import ContextHook

# Where transformers and torch's own wrapper keep the function that computes a layer again.
TRANSFORMERS, TORCH = "_gradient_checkpointing_func", "checkpoint_fn"


class Context(Protocol):
    """A context that writes into a model."""

    def kept(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which a part of the pass that is running can be computed again."""
        ...


_open: weakref.WeakKeyDictionary[nn.Module, list[Context]] = weakref.WeakKeyDictionary()
# Which contexts each model's layer is under that is being computed in this thread.
_under = threading.local()


@contextmanager
def checkpointed(hf_model: Any, context: Context) -> Iterator[None]:
    """Have a context be there again where gradient checkpointing computes layers again."""
    contexts = _open.setdefault(hf_model, [])
    contexts.append(context)
    try:
        with held(("checkpointing", hf_model), partial(_remembering, hf_model)):
            yield
    finally:
        contexts.remove(context)


def applies(hf_model: Any, context: Context) -> bool:
    """Whether a context is one of those that what is being computed is under."""
    under = getattr(_under, "contexts", {}).get(hf_model)
    if under is not None:
        return context in under
    # Otherwise what is computed again in a backward pass was first computed before the context was
    # opened, unless it is the user's own code that has it computed again.
    return torch._C._current_graph_task_id() == -1 or not is_checkpointed(hf_model)


def is_checkpointed(hf_model: Any) -> bool:
    """Whether a model has parts of it computed again for the backward pass."""
    return any(True for _ in _functions(hf_model))


@contextmanager
def _remembering(hf_model: Any) -> Iterator[None]:
    """Have layers that are to be computed again remember their contexts."""
    replaced: list[tuple[nn.Module, str]] = []

    def replace(*_: Any) -> None:
        # At each pass, as checkpointing may be switched on meanwhile.
        if torch.is_grad_enabled() and hf_model.training:
            for module, name in _functions(hf_model):
                function = vars(module)[name]
                if not isinstance(function, Remembering):
                    setattr(module, name, Remembering(function, hf_model))
                    replaced.append((module, name))

    replace()
    handle = hf_model.register_forward_pre_hook(ContextHook(replace))
    try:
        yield
    finally:
        handle.remove()
        for module, name in replaced:
            function = vars(module).get(name)
            if isinstance(function, Remembering):
                setattr(module, name, function.function)


def _functions(hf_model: Any) -> Iterator[tuple[nn.Module, str]]:
    """Where a model keeps a function that computes a part of it again."""
    for module in hf_model.modules():
        held = vars(module)
        if TRANSFORMERS in held and module.gradient_checkpointing:
            yield module, TRANSFORMERS
        if TORCH in held:
            yield module, TORCH


class Remembering:
    """Computes something again under the contexts that it was first computed under."""

    def __init__(self, function: Callable[..., Any], hf_model: Any) -> None:
        self.function, self.hf_model = function, hf_model

    def __reduce__(self) -> Any:
        # No copy of the model is under the contexts.
        return _itself, (self.function,)

    def __call__(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function in whose place this is does, computing under the present contexts."""
        contexts = list(_open.get(self.hf_model, ()))
        again = [context.kept() for context in contexts]
        first = True

        def remembered(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            with ExitStack() as stack:
                stack.enter_context(_computing_under(self.hf_model, contexts))
                for context in () if first else again:
                    stack.enter_context(context())
                first = False
                return compute(*args, **kwargs)

        return self.function(remembered, *args, **kwargs)


def _itself(function: Any) -> Any:
    return function


@contextmanager
def _computing_under(hf_model: Any, contexts: Sequence[Context]) -> Iterator[None]:
    former = getattr(_under, "contexts", {})
    _under.contexts = former | {hf_model: contexts}
    try:
        yield
    finally:
        _under.contexts = former
