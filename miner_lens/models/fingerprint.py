"""A short digest by which weights are told apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Changed whenever other elements are read, so that no two versions are held against each other.
VERSION = "2"
SAMPLES = 2**15
MOST_SQUARES = 16


def fingerprint(hf_model: Any) -> str | None:
    """A digest of the weights of a whole model, its towers included, and of its active adapters.

    Of each tensor it reads the diagonal, wrapped around, rounded to bfloat16, so that each row and
    each column has an element in it; of embeddings every few rows.

    Returns:
        `version:digest`, or None where weights cannot be read: on the meta device, or quantized.
    """
    if quantization(hf_model) is not None:
        return None
    digest, seen = hashlib.sha256(), set()
    for weight in _weights(hf_model):
        if not _readable(weight):
            return None
        some = _diagonal(weight)
        # Tied weights count once, also where offloading has parted them.
        if some not in seen:
            seen.add(some)
            digest.update(some)
    return f"{VERSION}:{digest.hexdigest()[:16]}"


def has_weight(module: Any) -> bool:
    """Whether a layer, with or without adapters, has a weight that can be read."""
    weight = getattr(_base(_inside(module)), "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point()


def quantization(hf_model: Any) -> str | None:
    """How weights are quantized, by the config or by what they are; None where they are not."""
    config = getattr(hf_model.config, "quantization_config", None)
    if config is not None:
        method = config if isinstance(config, dict) else vars(config)
        return str(getattr(method.get("quant_method"), "value", method.get("quant_method")))
    for weight in hf_model.parameters():
        if not (weight.is_meta or _readable(weight)):
            plain = type(weight) in (Tensor, nn.Parameter)
            return str(weight.dtype if plain else type(weight.data).__name__)
    for module in hf_model.modules():
        # Torch's own and others pack weights into what is no parameter.
        plain = any(one is not None for one in module._parameters.values())
        if plain or not hasattr(module, "in_features"):
            continue
        if next(module.parameters(), None) is None:
            return str(_inside(module)._get_name())
    return None


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """The parameters below a module in the order of a model without a bridge around it."""
    module = _base(_chosen(_inside(module)))
    for name, weight in module._parameters.items():
        if weight is not None:
            yield _loaded(module, name, weight)
    for child in module._modules.values():
        if child is not None:
            yield from _weights(child)
            yield from _of_adapters(_inside(child))


def _inside(module: Any) -> Any:
    """The module that a TransformerLens component stands for."""
    while getattr(module, "original_component", None) is not None:
        module = module.original_component
    return module


def _base(module: Any) -> Any:
    """A layer without its PEFT adapters."""
    while hasattr(module, "base_layer"):
        module = _inside(module.base_layer)
    return module


def _chosen(module: Any) -> Any:
    """Of a layer that PEFT has copied to train it whole, the one that computes."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None or not hasattr(module, "original_module"):
        return module
    active = [] if module.disable_adapters else [n for n in module.active_adapters if n in copies]
    return _inside(copies[active[0]] if active else module.original_module)


def _of_adapters(layer: Any) -> Iterator[Tensor]:
    """What active PEFT adapters add to a layer's weights, scaled; nothing where that is 0."""
    if not hasattr(layer, "base_layer") or layer.disable_adapters or layer.merged:
        return
    for active in layer.active_adapters:
        tensors = [
            tensor
            for name, tensor in layer.named_parameters()
            if not name.startswith("base_layer.") and active in name.split(".")
        ]
        if all(tensor.is_meta or bool(tensor.any()) for tensor in tensors if tensor.ndim > 1):
            yield from tensors
            scale = getattr(layer, "scaling", {}).get(active)
            if isinstance(scale, int | float):
                yield torch.tensor([float(scale)])


def _loaded(module: Any, name: str, weight: Tensor) -> Tensor:
    """A weight, also where accelerate has offloaded it."""
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    loaded: Tensor = offloaded[name] if weight.is_meta and offloaded is not None else weight
    return loaded


def _readable(weight: Tensor) -> bool:
    """Whether its elements are numbers, and not packed ones in a type of a library's own."""
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_meta
    return plain and weight.is_floating_point() and weight.element_size() > 1


def _diagonal(weight: Tensor) -> bytes:
    rows, columns = weight.shape[:1].numel(), math.prod(weight.shape[1:])
    longer, shorter = (max(rows, columns), min(rows, columns)) if weight.numel() else (0, 0)
    if longer > min(SAMPLES, MOST_SQUARES * shorter) or not weight.is_contiguous():
        index = torch.arange(0, longer, 1 + longer // SAMPLES, device=weight.device)
        some = weight.detach().reshape(rows, columns)[index % rows, index % columns]
    else:  # the same without an index, in half the time: one square after the other
        flat, square = weight.detach().reshape(-1), columns if rows >= columns else 1
        parts = [
            flat[first * square :][: min(shorter, longer - first) * (columns + 1) : columns + 1]
            for first in range(0, longer, shorter or 1)
        ]
        some = torch.cat(parts) if parts else flat
    return some.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
