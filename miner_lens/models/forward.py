"""How a model is run when only its hook points matter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from miner_lens.models import attention
from miner_lens.models.generation import Inputs
from miner_lens.models.inside import hf_model_of, uncompiled


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout, fused attention, and no compiled code, which passes hooks by.

    The model's own settings come back afterwards.
    """
    hf_model = hf_model_of(model)
    training = [module for module in hf_model.modules() if module.training]
    hf_model.eval()
    try:
        with attention.fused(attention.attentions_of(model)), uncompiled():
            yield
    finally:
        for module in training:
            module.training = True


_aside: ContextVar[bool] = ContextVar("aside", default=False)


@contextmanager
def aside() -> Iterator[None]:
    """An analyzer's code is running: what it calls of the model is no part of the pass."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def is_aside() -> bool:
    """Whether it is `aside`."""
    return _aside.get()


@contextmanager
def last_logits(hf_model: Any, count: int | None = 1) -> Iterator[Inputs]:
    """No projection onto the vocabulary but of the last positions.

    Args:
        hf_model: The model.
        count: Of how many; None: of all, so that nothing changes.

    Yields:
        What to tell the model; one that cannot be told so has its head see no more.
    """
    if count is None:
        yield {}
        return
    if "logits_to_keep" in inspect.signature(hf_model.forward).parameters:
        yield {"logits_to_keep": count}
        return
    head = hf_model.get_output_embeddings()
    if head is None:
        yield {}
        return

    def cut(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if is_aside() else (args[0][:, -count:], *args[1:])

    handle = head.register_forward_pre_hook(cut)
    try:
        yield {}
    finally:
        handle.remove()
