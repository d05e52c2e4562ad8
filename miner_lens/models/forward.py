"""How a model is run when only its hook points matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miner_lens.models import attention
from miner_lens.models.holders import held
from miner_lens.models.inside import hf_model_of, uncompiled


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No dropout, fused attention, and no compiled code, which passes hooks by.

    The model's own settings come back afterwards.
    """
    hf_model = hf_model_of(model)
    with (
        held(("evaluation mode", hf_model), partial(_evaluation_mode, hf_model)),
        held(("fused attention", hf_model), partial(attention.fused, model)),
        uncompiled(),
    ):
        yield


@contextmanager
def _evaluation_mode(hf_model: Any) -> Iterator[None]:
    training = [module for module in hf_model.modules() if module.training]
    if training:
        hf_model.eval()
    try:
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
def differentiable(hf_model: Any, towers: Sequence[Any] = ()) -> Iterator[None]:
    """Gradients reach activations, and no weight.

    They begin where tokens are embedded, and in towers at what these are given, so that what is
    kept for the backward pass grows with the activations alone.

    Args:
        hf_model: The model.
        towers: Modules of towers in which gradients are wanted.
    """

    def begin(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().requires_grad_(True).clone()  # some families write into it

    def begin_tower(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(map(begin, args)), {name: begin(value) for name, value in kwargs.items()}

    embeddings = hf_model.get_input_embeddings()
    handles = [embeddings.register_forward_hook(lambda _, __, embedded: begin(embedded))]
    handles += [one.register_forward_pre_hook(begin_tower, with_kwargs=True) for one in towers]
    try:
        with held(("frozen weights", hf_model), partial(_frozen, hf_model)), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(hf_model: Any) -> Iterator[None]:
    trained = [parameter for parameter in hf_model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def last_logits(hf_model: Any, count: int | None = 1) -> Iterator[None]:
    """No projection onto the vocabulary but of the last positions.

    The head is shown no more than these. The model is not told, as some families then compute
    their last layers at these positions alone.

    Args:
        hf_model: The model.
        count: Of how many; None: of all, so that nothing changes.
    """
    head = hf_model.get_output_embeddings()
    if count is None or head is None:
        yield
        return
    last = slice(-count, None)

    def cut(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        cannot = is_aside() or not args or args[0].ndim < 3
        return None if cannot else (args[0][:, last], *args[1:])

    handle = head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()
