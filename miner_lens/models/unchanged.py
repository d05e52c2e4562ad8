"""Tell whether a model computes in its bridge what it computed before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from miner_lens.models.inside import uncompiled

TOKENS = 16

CHANGED = (
    "In a TransformerBridge this {architecture} gives other logits: those of a short prompt differ "
    "by {apart:.1%} of their spread, where rounding explains up to {rounding:.1%}. The model was "
    "taken out of the bridge again and is as it was. Its TransformerLens adapter ({adapter}) does "
    "not fit it; ml.wrap(model, check=False) wraps it all the same."
)
NOT_COMPARED = (
    "The model's logits in its bridge were not compared with those before, as {why}. "
    "check=False leaves the comparison out."
)


def short_logits(hf_model: Any) -> Tensor | str:
    """Return logits of a short prompt, [pos token], or say why there are none.

    The model is left as it was: its mode, the tensors that a pass leaves on its modules, and the
    state of random generators.
    """
    parameters = list(hf_model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return "weights are offloaded, or on the meta device"
    ids = torch.tensor([_ordinary_tokens(hf_model)])
    if ids.shape[1] < 2:
        return "its config leaves no token that is certain to be text"
    ids = ids.to(hf_model.get_input_embeddings().weight.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(hf_model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(hf_model.forward).parameters:
        inputs["use_cache"] = False
    try:
        with _undisturbed(hf_model, parameters):
            logits: Tensor = hf_model(**inputs).logits[0]
    except Exception as error:  # whatever a family asks of its inputs
        return f"it does not run on token ids alone ({type(error).__name__}: {str(error)[:200]})"
    if logits.isnan().any():
        return "its logits are not numbers"
    return logits


def difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return how far logits differ, in parts of their spread, and how far rounding may take them.

    Rounding is let have half of the digits, as other orders of summing add up over layers.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> round(difference(logits, logits + torch.tensor([0.0, 0.0, 1.0]))[0], 4)
        0.7071
    """
    # Some families write the lowest number there is to tokens that are never said.
    said = before > torch.finfo(before.dtype).min / 2
    digits = max(torch.finfo(kind).eps for kind in (before.dtype, after.dtype, torch.float32))
    before, after = (
        torch.where(said, logits, 0).float() for logits in (before, after.to(before.device))
    )
    apart, spread = (before - after).norm(), (before - before.mean(-1, keepdim=True)).norm()
    return float(apart / spread.clamp(min=torch.finfo().tiny)), digits**0.5


def _ordinary_tokens(hf_model: Any) -> list[int]:
    """Tokens that no config mentions, as those of media and delimiters are."""
    mentioned = set(_numbers(hf_model.config.to_dict()))
    count = hf_model.get_input_embeddings().weight.shape[0]
    step = max(1, count // (4 * TOKENS))
    ordinary = [token for token in range(1, count, step) if token not in mentioned]
    return ordinary[:: max(1, len(ordinary) // TOKENS)][:TOKENS]


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list | tuple):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _numbers(below)


@contextmanager
def _undisturbed(hf_model: Any, parameters: list[Tensor]) -> Iterator[None]:
    modules = list(hf_model.modules())
    training = [module for module in modules if module.training]
    # A pass leaves some of its tensors, as Qwen2-VL the offset of positions.
    left = [
        {name: value for name, value in vars(module).items() if _is_left(value)}
        for module in modules
    ]
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    with ExitStack() as open_:
        open_.enter_context(torch.no_grad())
        open_.enter_context(uncompiled())
        open_.enter_context(torch.random.fork_rng(list(devices)))
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
            for module, values in zip(modules, left, strict=True):
                vars(module).update(values)


def _is_left(value: Any) -> bool:
    return value is None or isinstance(value, Tensor)
