"""Which model is inside a bridge, and inside the wrappers of torch and PEFT."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from miner_lens.models.holders import held

# Bridges that a model was taken out of.
_retired: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def bare(model: Any) -> Any:
    """A model without what torch.compile, torch's data parallelism and PEFT put around it."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", ()):
            model = model._orig_mod
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model


def is_bridge(model: Any) -> bool:
    """Whether this is a `TransformerBridge` rather than a plain Hugging Face model."""
    # Asked of the class: of the bridge itself, hook_dict is gathered from all modules each time.
    return hasattr(model, "original_model") and hasattr(type(model), "hook_dict")


def hf_model_of(model: Any) -> Any:
    """The Hugging Face model inside a bridge and any wrappers, or the model itself.

    Raises:
        TypeError: This is the name of a model, or its class.
        ValueError: This is neither, or the model was taken out of this bridge.
    """
    if isinstance(model, str | Path):
        raise TypeError(
            f"Expected a loaded model, got a name. Load it first: ml.load({str(model)!r})."
        )
    if isinstance(model, type):
        raise TypeError(
            f"Expected a loaded model, got the class {model.__name__}. Load one with "
            f"{model.__name__}.from_pretrained(name), or model and processor with ml.load(name)."
        )
    model = bare(model)
    if not is_bridge(model):
        if not hasattr(model, "get_decoder"):
            raise ValueError(
                "Expected a TransformerBridge or a Hugging Face model, got "
                f"{type(model).__name__}. Load one with ml.load, or wrap a Hugging Face model with "
                "ml.wrap; TransformerLens's HookedRootModule has none inside."
            )
        return model
    if model in _retired:
        _refuse()
    return bare(model.original_model)


def processor_of(model: Any) -> Any:
    """The processor that a model, or what is inside its wrappers, was given; None without one."""
    return getattr(model, "processor", None) or getattr(bare(model), "processor", None)


def model_name(model: Any) -> str:
    """Hub id, or the last part of a local path, so that no machine's paths reach a file."""
    name = str(getattr(hf_model_of(model).config, "_name_or_path", "") or "")
    return Path(name).name if name.startswith((".", "/", "~")) or Path(name).is_dir() else name


def retire(bridge: Any) -> None:
    """Have a bridge that its model was taken out of say so when it is used."""
    _retired.add(bridge)
    bridge.forward = _refuse


def compiled(model: Any) -> list[nn.Module]:
    """What torch.compile has put around the model, and around parts of it."""
    return [part for part in model.modules() if "_orig_mod" in part._modules]


def is_compiled(model: Any) -> bool:
    """Whether torch.compile has compiled the model or a part of it, also in place."""
    in_place = any(part._compiled_call_impl is not None for part in model.modules())
    return in_place or bool(compiled(model))


def uncompiled() -> AbstractContextManager[None]:
    """Run what torch.compile has compiled as it is written, while the context is open.

    Compiled code passes by hooks that were registered after it was compiled, and goes on with those
    that have been removed since.
    """
    return held("eager", _eager)


@contextmanager
def _eager() -> Iterator[None]:
    ours = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        now = torch.compiler.set_stance("default")
        # Somebody else may have set another since, which stays.
        (ours if now.prev is ours.stance else now).__exit__(None, None, None)


def _refuse(*_: Any, **__: Any) -> None:
    raise ValueError(
        "The model was taken out of this bridge by ml.unwrap. Use the Hugging Face model that it "
        "returned, or the bridge that ml.wrap makes of that one."
    )
