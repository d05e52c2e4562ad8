"""How a model is run when only its hook points matter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def one_logit(hf_model: Any) -> Iterator[Inputs]:
    """No projection onto the vocabulary but of the last position.

    Yields:
        What to tell the model; one that cannot be told so has its head see no more.
    """
    if "logits_to_keep" in inspect.signature(hf_model.forward).parameters:
        yield {"logits_to_keep": 1}
        return
    head = hf_model.get_output_embeddings()
    if head is None:
        yield {}
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, -1:], *args[1:]))
    try:
        yield {}
    finally:
        handle.remove()
