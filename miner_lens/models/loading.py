"""Models: load one, wrap one, and find the neurons inside it.

Everything here takes a `TransformerBridge`, whoever made it, or a plain Hugging Face model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from miner_lens import organisms
from miner_lens.models import sites
from miner_lens.models.devices import default_device
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.modality import ModalityLayout, layout_for
from miner_lens.models.sites import ACTIVATION_NAMES, MLP

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, ProcessorMixin


def load(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
) -> TransformerBridge:
    """Load a multimodal model and its processor, ready to be mined.

    Args:
        name_or_path: A checkpoint folder, a hub id, or the name of a model organism that comes
            with this package (`"shapes"`).
        device: Where to put the model; default the accelerator if there is one.
        dtype: Weight dtype; default the checkpoint's own.
        device_map: Hugging Face device map, for a model larger than one device.
        revision: Hub branch, tag or commit.

    Returns:
        A `TransformerBridge` with `.processor` and `.modality_layout`. The logits of Qwen2-VL and
        Qwen2-Audio equal those of the plain Hugging Face model bit for bit.

    Raises:
        ValueError: The model family is unknown, or both `device` and `device_map` are given.
    """
    import transformers
    from transformer_lens.model_bridge.sources.transformers.helpers import (
        get_hf_model_class_for_architecture,
    )

    if device is not None and device_map is not None:
        raise ValueError("Give device or device_map, not both: the map already says where.")
    path = _resolve(name_or_path)
    config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    architecture = (config.architectures or [type(config).__name__])[0]
    _require_adapter(architecture)
    model = get_hf_model_class_for_architecture(architecture).from_pretrained(
        path, dtype=dtype, device_map=device_map, revision=revision
    )
    if device_map is None:
        model.to(device or default_device())
    return wrap(model.eval(), _load_processor(path, revision))


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
    _require_adapter(architecture)
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


def mlps(model: Any, site: str = "llm") -> list[MLP]:
    """The MLPs of a site, one per layer.

    Raises:
        ValueError: The model has no such site, a decoder layer has no gated MLP, or its weights
            were folded by compatibility mode, which computes the MLP without its activation module.
    """
    hf_model = hf_model_of(model)
    return sites.find(hf_model, site).mlps(hf_model)


def identity(model: Any, site: str = "llm") -> ModelIdentity:
    """Say which model this is, so that scores and neuron sets can refuse another one.

    The fingerprint hashes some thousand weights of the site and of the embedding, rounded to
    bfloat16, so that float32 and bfloat16 copies of a checkpoint have the same; float16 rounds
    once more and may have another. Offloaded weights are read from where they are. It is None
    where weights cannot be read (on the meta device, or packed by quantization).

    Raises:
        ValueError: The model has no such site.
    """
    hf_model = hf_model_of(model)
    found = mlps(model, site)
    return ModelIdentity(
        name=model_name(model),
        architecture=type(hf_model).__name__,
        layers=len(found),
        neurons=found[0].before.out_features,
        site=site,
        fingerprint=_fingerprint(hf_model, found),
    )


def _fingerprint(hf_model: Any, mlps: Sequence[MLP]) -> str | None:
    layers = sorted({0, len(mlps) // 2, len(mlps) - 1})
    modules = [module for n in layers for module in (mlps[n].before, mlps[n].down)]
    weights = [_weight(module) for module in (*modules, hf_model.get_input_embeddings())]
    if any(weight.is_meta or not weight.is_floating_point() for weight in weights):
        return None
    digest = hashlib.sha256()
    for weight in weights:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16)
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _weight(module: Any) -> Tensor:
    """A module's weight, also where accelerate has offloaded it to memory or disk."""
    weight: Tensor = module.weight
    if weight.is_meta:
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        return weight if offloaded is None else offloaded["weight"]
    return weight


def layout(model: Any) -> ModalityLayout:
    """The modality layout of a model, whoever made the bridge.

    Raises:
        ValueError: No installed package provides one for this model family.
    """
    attached = vars(model).get("modality_layout")
    if attached is not None:
        return attached  # type: ignore[no-any-return]
    hf_model = hf_model_of(model)
    tokenizer = getattr(getattr(model, "processor", None), "tokenizer", None)
    tokenizer = tokenizer or vars(model).get("tokenizer") or getattr(model, "tokenizer", None)
    found = layout_for(type(hf_model).__name__, hf_model.config, tokenizer)
    if found is None:
        raise ValueError(
            f"No modality layout is known for {type(hf_model).__name__}. Pass prepared pairs "
            "(model_inputs, masks) as data, set model.modality_layout to a ModalityLayout, or "
            "provide one through the entry-point group 'miner_lens.modalities'."
        )
    return found


def _resolve(name_or_path: str | Path) -> str:
    name = str(name_or_path)
    if name in organisms.names() and not Path(name, "config.json").exists():
        return str(organisms.path(name))
    return name


def _load_processor(path: str, revision: str | None) -> Any:
    """The checkpoint's processor, or None where the folder ships none."""
    import transformers

    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    if Path(path).is_dir() and not any(Path(path, file).exists() for file in files):
        return None
    processors: Any = transformers.AutoProcessor
    return processors.from_pretrained(path, revision=revision)


def _require_adapter(architecture: str) -> None:
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
