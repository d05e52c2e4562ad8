"""Bridges: wrap a Hugging Face model, give it the hook points that mining needs, look inside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from miner_lens.models.modality import layout_for
from miner_lens.models.sites import ACTIVATION_NAMES

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, ProcessorMixin


def wrap(
    hf_model: PreTrainedModel, processor: ProcessorMixin | Any | None = None
) -> TransformerBridge:
    """Turn a loaded Hugging Face model into a `TransformerBridge` with neuron hook points.

    The model itself is used, not a copy: TransformerLens puts its components into it.

    Args:
        hf_model: The model; its weights stay where and what they are.
        processor: Its processor. Without one, feed prepared inputs instead of messages.

    Raises:
        ValueError: The model family is unknown or the model is wrapped already.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    architecture = type(hf_model).__name__
    require_adapter(architecture)
    if any(isinstance(module, GeneralizedComponent) for module in hf_model.modules()):
        raise ValueError(
            f"This {architecture} is inside a TransformerBridge already. "
            "Use that bridge, or load the model again."
        )
    # A text model's processor is its tokenizer.
    tokenizer = getattr(processor, "tokenizer", processor)
    bridge = build_bridge_from_module(
        hf_model,
        architecture,
        hf_config=copy.deepcopy(hf_model.config),
        # A copy, because TransformerLens changes the padding and special tokens of what it gets.
        tokenizer=copy.deepcopy(tokenizer),
        model_name=model_name(hf_model),
    )
    bridge.processor = processor
    # Without a tokenizer some delimiters are unknown; `layout` looks again when one is there.
    bridge.modality_layout = (
        None if tokenizer is None else layout_for(architecture, hf_model.config, tokenizer)
    )
    return prepare(bridge)


def prepare(bridge: Any) -> Any:
    """Give any `TransformerBridge` the hook points that mining needs.

    These are `blocks.{i}.mlp.act.hook_out` on every gated MLP and live `hook_rot_q` and
    `hook_rot_k`. Idempotent, and changes no output. Plain Hugging Face models pass unchanged.
    """
    if not is_bridge(bridge):
        return bridge
    from miner_lens.models import attention

    # Each time, because the model's attention setting may have been changed since.
    attention.install(attention.attentions_of(bridge))
    hf_model = bridge.original_model
    if vars(bridge).get("_miner_lens_prepared") == id(hf_model):  # a deep copy has another
        return bridge
    blocks = list(bridge.blocks)
    added = [_attach_activation(block.mlp) for block in blocks if "mlp" in block._modules]
    if any(added):
        bridge._scan_existing_hooks(bridge, "")
        driver = bridge._driver
        driver.supported_hook_points |= (
            frozenset(bridge.hook_dict) - driver.non_fireable_hook_points
        )
    seen = PassInputs()
    hf_model.register_forward_pre_hook(seen.see, with_kwargs=True)
    hf_model.register_forward_hook(seen.forget, always_call=True)
    bridge._miner_lens_inputs = seen
    bridge._miner_lens_prepared = id(hf_model)
    return bridge


class PassInputs:
    """The inputs of the forward pass that is running, its token ids and its padding mask."""

    def __init__(self) -> None:
        self.all: dict[str, Any] = {}
        self.ids: Tensor | None = None
        self.real: Tensor | None = None

    def see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the Hugging Face model."""
        self.ids = kwargs.get("input_ids", args[0] if args else None)
        self.all = kwargs | {"input_ids": self.ids}
        self.real = None
        mask = kwargs.get("attention_mask")
        # A static cache passes a mapping of prepared masks instead.
        if self.ids is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            # While decoding with a cache the mask spans the past as well.
            self.real = mask[:, -self.ids.shape[1] :].to(torch.bool)

    def forget(self, *_: Any) -> None:
        """A forward hook of the Hugging Face model: what was seen is of no later pass."""
        self.ids = self.real = None
        self.all = {}


def _attach_activation(mlp: Any) -> bool:
    """Put a hooked `act` component around the activation function of a gated MLP."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    original = mlp.original_component
    if "act" in mlp._modules or original is None or "gate" not in mlp._modules:
        return False
    for name in ACTIVATION_NAMES:
        function = original._modules.get(name)
        if isinstance(function, nn.Module):
            component = GeneralizedComponent(name=name)
            component.set_original_component(function)
            setattr(original, name, component)
            mlp.add_module("act", component)
            mlp.real_components["act"] = (name, component)
            return True
    return False


def is_bridge(model: Any) -> bool:
    """Whether this is a `TransformerBridge` rather than a plain Hugging Face model."""
    return hasattr(model, "original_model") and hasattr(model, "hook_dict")


def hf_model_of(model: Any) -> Any:
    """The Hugging Face model inside a bridge, or the model itself."""
    return model.original_model if is_bridge(model) else model


def model_name(model: Any) -> str:
    """Hub id, or the last part of a local path, so that no machine's paths reach a file."""
    name = str(getattr(hf_model_of(model).config, "_name_or_path", "") or "")
    return Path(name).name if name.startswith((".", "/", "~")) or Path(name).is_dir() else name


def require_adapter(architecture: str) -> None:
    """Refuse a model family that TransformerLens has no adapter for.

    Raises:
        ValueError: Neither TransformerLens nor an installed package has one.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    ArchitectureAdapterFactory.discover_entry_points()
    if architecture not in ArchitectureAdapterFactory._adapters:
        raise ValueError(
            f"Unknown model family {architecture}: neither TransformerLens nor an installed "
            "package has an adapter for it. To add one, write a TransformerLens "
            "ArchitectureAdapter and a modality layout, and name them in the entry-point groups "
            "'transformer_lens.architectures' and 'miner_lens.modalities'; see "
            "docs/adding-a-model-family.md."
        )


def pass_inputs(bridge: Any) -> PassInputs:
    """STUB."""
    return bridge._miner_lens_inputs
