"""Bridges: wrap a Hugging Face model, give it the hook points that mining needs, unwrap it."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from miner_lens.models import experts
from miner_lens.models.inside import bare, hf_model_of, is_bridge, model_name, retire
from miner_lens.models.mistral import is_mistral
from miner_lens.models.modality import layout_for
from miner_lens.models.pass_inputs import PassInputs, watching
from miner_lens.models.structure import (
    ACTIVATION_NAMES,
    mlp_names,
    part,
    plain,
    walk,
)
from miner_lens.models.unchanged import CHANGED, NOT_COMPARED, difference, short_logits

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, ProcessorMixin

UNKNOWN = (
    "Unknown model family {architecture}: neither TransformerLens nor an installed package has an "
    "adapter for it, and {why}. To add one, write a TransformerLens ArchitectureAdapter and name "
    "it in the entry-point group 'transformer_lens.architectures'; see "
    "docs/adding-a-model-family.md."
)

NO_PROCESSOR = (
    "The second argument of wrap is the model's processor, or None, and not {given}. Pass what "
    "transformers.AutoProcessor.from_pretrained(name) returns: a processor with a tokenizer, or "
    "the tokenizer itself for a model of text alone. Options go by name, as check=False."
)

# What TransformerLens may have changed of a wrapped model's configs: the config, the name of its
# attention function before, and the name after.
_attention_names: weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, str, str]]] = (
    weakref.WeakKeyDictionary()
)

# Attributes that TransformerLens has given to a wrapped model's modules, by the modules' names.
_added: weakref.WeakKeyDictionary[nn.Module, list[tuple[str, str]]] = weakref.WeakKeyDictionary()


def wrap(
    hf_model: PreTrainedModel,
    processor: ProcessorMixin | Any | None = None,
    check: bool = True,
) -> TransformerBridge:
    """Turn a loaded Hugging Face model into a `TransformerBridge` with neuron hook points.

    The model itself is used, not a copy: TransformerLens puts its components into it, until
    `unwrap` takes them out.

    Args:
        hf_model: The model; its weights stay where and what they are. It may have PEFT adapters.
            Wrappers around it (torch.compile, DistributedDataParallel, PEFT) are looked through.
        processor: Its processor. Without one, feed prepared inputs instead of messages.
        check: Compare the logits of a short prompt before and after, and refuse a model whose
            logits differ by more than rounding. A warning says why where they cannot be compared,
            as with offloaded weights.

    Raises:
        TypeError: This is the name or the class of a model, or the processor is none.
        ValueError: The model family is unknown, the model is wrapped already, or its logits are
            others in a bridge; then it is as it was.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf_model = hf_model_of(hf_model)
    architecture = type(hf_model).__name__
    if any(isinstance(module, GeneralizedComponent) for module in hf_model.modules()):
        raise ValueError(
            f"This {architecture} is inside a TransformerBridge already. "
            "Use that bridge, or take the model out of it with ml.unwrap(bridge)."
        )
    # A text model's processor is its tokenizer.
    tokenizer = getattr(processor, "tokenizer", processor)
    _require_processor(processor, tokenizer)
    _require_adapter(hf_model)
    expected = short_logits(hf_model) if check else None
    configs = _configs(hf_model)
    before = [config._attn_implementation for config in configs]
    attributes = {path: set(vars(module)) for path, module in walk(hf_model)}
    modes = {module: module.training for module in hf_model.modules()}
    bridge = build_bridge_from_module(
        hf_model,
        architecture,
        hf_config=copy.deepcopy(hf_model.config),
        # A copy, because TransformerLens changes the padding and special tokens of what it gets.
        tokenizer=None if is_mistral(tokenizer) else copy.deepcopy(tokenizer),
        model_name=model_name(hf_model),
    )
    for module, mode in modes.items():  # TransformerLens gives all that of the model
        module.training = mode
    _keep_attention(bridge, configs, before)
    after = [config._attn_implementation for config in configs]
    _attention_names[hf_model] = list(zip(configs, before, after, strict=True))
    _added[hf_model] = [
        (path, name)
        for path, had in attributes.items()
        for name in vars(part(hf_model, path)).keys() - had
    ]
    bridge.processor = processor
    # Without a tokenizer some delimiters are unknown; `layout` looks again when one is there.
    bridge.modality_layout = (
        None if tokenizer is None else layout_for(architecture, hf_model.config, tokenizer)
    )
    prepare(bridge)
    if expected is not None:
        _require_unchanged(bridge, expected)
    return bridge


def _require_processor(processor: Any, tokenizer: Any) -> None:
    """Refuse a processor, or the tokenizer in it, that TransformerLens cannot set up."""
    is_tokenizer = isinstance(tokenizer, PreTrainedTokenizerBase) or is_mistral(tokenizer)
    if isinstance(processor, nn.Module) or not (is_tokenizer or tokenizer is None):
        given = f"an object of type {type(processor).__name__}"
        if isinstance(processor, type):
            given = f"the class {processor.__name__}"
        elif isinstance(processor, str | int):
            given = repr(processor)
        raise TypeError(NO_PROCESSOR.format(given=given))


def _require_unchanged(bridge: Any, expected: Tensor | str) -> None:
    """Refuse a bridge in which a model's logits are others than were expected, and undo it."""
    hf_model, got = hf_model_of(bridge), expected
    if isinstance(expected, Tensor):
        got = short_logits(hf_model)
    if isinstance(expected, str) or isinstance(got, str):
        warnings.warn(NOT_COMPARED.format(why=got), stacklevel=3)
        return
    apart, rounding = difference(expected, got)
    if apart > rounding:
        adapter = type(bridge.adapter).__name__
        unwrap(bridge)
        told = {"architecture": type(hf_model).__name__, "adapter": adapter}
        raise ValueError(CHANGED.format(apart=apart, rounding=rounding, **told))


def prepared_bridge(model: Any) -> Any:
    """The bridge inside any wrappers, with the hook points that mining needs.

    Raises:
        ValueError: There is no bridge inside.
    """
    bridge = bare(model)
    if not is_bridge(bridge):
        hf_model_of(bridge)
        raise ValueError(
            f"A TransformerBridge is needed, not {type(bridge).__name__}: use ml.wrap(model)."
        )
    return prepare(bridge)


def unwrap(bridge: TransformerBridge) -> PreTrainedModel:
    """Take the plain Hugging Face model out of its bridge again, as it was before.

    Its modules, hooks and attention function are those of a model that was never wrapped, so that
    it can be saved, trained, compiled, or wrapped anew. The bridge cannot be used any more.

    Raises:
        ValueError: This is no bridge, or compatibility mode has changed the weights.

    Example:
        plain = ml.unwrap(model)
        plain.save_pretrained("checkpoint")
        model = ml.wrap(plain, model.processor)
    """
    bridge = bare(bridge)
    if not is_bridge(bridge):
        raise ValueError(
            f"unwrap needs a TransformerBridge, got {type(bridge).__name__}. A Hugging Face model "
            "that is in no bridge needs no unwrapping."
        )
    from miner_lens.models import attention, bridge_methods

    hf_model = hf_model_of(bridge)
    if getattr(bridge, "_weights_processed", False):
        raise ValueError(
            "This bridge is in compatibility mode with processed weights, and the former weights "
            "are gone. Load the model again."
        )
    attention.uninstall(bridge)
    bridge_methods.uninstall(hf_model)
    for config, before, after in _attention_names.pop(hf_model, ()):
        if config._attn_implementation == after:  # or somebody has set another since
            config._attn_implementation = before
    for block in bridge.blocks:
        experts.uninstall(block._modules.get("mlp"))
    for seen in watching(hf_model):
        seen.stop()
    for path, name in _added.pop(hf_model, ()):
        vars(part(hf_model, path)).pop(name, None)
    _take_out(hf_model)
    retire(bridge)
    return hf_model  # type: ignore[no-any-return]


def _take_out(module: nn.Module) -> None:
    """Put the modules back in whose places TransformerLens has put its components."""
    from transformer_lens.model_bridge.generalized_components import UnembeddingBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    for name, child in list(module._modules.items()):
        while isinstance(child, GeneralizedComponent):
            component, child = child, child.original_component
            setattr(module, name, child)
            if isinstance(component, UnembeddingBridge) and "bias" in child._buffers:
                # The zeros that TransformerLens gives a head without a bias.
                del child.bias
                child.register_parameter("bias", None)
                getattr(getattr(child, "_hf_hook", None), "original_devices", {}).pop("bias", None)
        if child is not None:
            _take_out(child)


def _keep_attention(bridge: Any, configs: list[Any], names: list[Any]) -> None:
    """Leave to TransformerLens the names of attention functions where it computes attention."""
    from miner_lens.models import attention

    components = attention.rebuilt(attention.attentions_of(bridge))
    computed = {id(getattr(plain(component), "config", None)) for component in components}
    set_by_it = [config._attn_implementation for config in configs]
    for config, name, theirs in zip(configs * 2, names * 2, set_by_it * 2, strict=True):
        # Twice, as setting a config's name sets those of the configs below it.
        wanted = theirs if id(config) in computed else name
        if config._attn_implementation != wanted:
            config._attn_implementation = wanted


def _configs(hf_model: nn.Module) -> list[Any]:
    """The configs of a model's parts that name an attention function, each once."""
    found = (getattr(module, "config", None) for module in hf_model.modules())
    return list({id(one): one for one in found if hasattr(one, "_attn_implementation")}.values())


def prepare(bridge: Any) -> Any:
    """Give any `TransformerBridge` the hook points that mining needs.

    These are `blocks.{i}.mlp.act.hook_out` on every gated MLP and on experts, and live `hook_rot_q`
    and `hook_rot_k`. Idempotent, and changes no output. Plain Hugging Face models pass unchanged.

    Raises:
        ValueError: The model was taken out of this bridge.
    """
    bridge = bare(bridge)
    if not is_bridge(bridge):
        return bridge
    from miner_lens.models import attention, bridge_methods, masking

    hf_model = hf_model_of(bridge)
    if watching(hf_model):
        attention.install(bridge)
        return bridge
    from miner_lens.models.opening import open_towers

    blocks = list(bridge.blocks)
    mlps = [block.mlp for block in blocks if "mlp" in block._modules]
    added = [_attach_activation(mlp) or _attach_experts(mlp) for mlp in mlps]
    opened = open_towers(bridge, hf_model)
    attention.install(bridge)
    if opened or any(added):
        bridge._scan_existing_hooks(bridge, "")
        driver = bridge._driver
        driver.supported_hook_points |= (
            frozenset(bridge.hook_dict) - driver.non_fireable_hook_points
        )
    names = {
        id(config): (before, after) for config, before, after in _attention_names.get(hf_model, ())
    }
    for component in attention.rebuilt(attention.attentions_of(bridge)):
        config = getattr(plain(component), "config", None)
        masking.install(component, *names.get(id(config), (None, None)))
        # transformers 5.24 has renamed the argument, and TransformerLens 4.3 looks for the former
        # name, without which each generated token sees itself alone.
        component.register_forward_pre_hook(_name_cache, with_kwargs=True)
    seen = PassInputs(of_bridge=True)
    seen.watch(hf_model)
    seen.handles += bridge_methods.install(bridge, hf_model)
    _give_modes(bridge, hf_model)
    return bridge


def _give_modes(bridge: Any, hf_model: nn.Module) -> None:
    """Train or evaluate each component as what it is around, and what is in it as itself."""
    found = (module for _, module in walk(hf_model))
    # TransformerLens makes lists of its own, in the place of the model's.
    modes = {one: one.training for one in found if not isinstance(one, nn.ModuleList)}
    for module in (*bridge.modules(), *hf_model.modules()):
        for child in module.children():
            if child not in modes:
                modes[child] = modes.get(plain(child), module.training)
                child.training = modes[child]


def _name_cache(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of attention that TransformerLens rebuilds."""
    if "cache" in kwargs and "past_key_values" not in kwargs:
        kwargs = kwargs | {"past_key_values": kwargs["cache"]}
    return args, kwargs


def _attach_activation(mlp: Any) -> bool:
    """Put a hooked `act` component around the activation function of a gated MLP."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    original = mlp.original_component
    if "act" in mlp._modules or original is None:
        return False
    # A layer without experts among such with them has no gate of its own in TransformerLens.
    if "gate" not in mlp._modules and not (mlp_names(original) or ("", ""))[1].startswith("gate"):
        return False
    for name in ACTIVATION_NAMES:
        function = original._modules.get(name)
        if isinstance(function, nn.Module):
            component = GeneralizedComponent(name=name)
            component.set_original_component(function)
            setattr(original, name, component)
            # A fused gate-and-up projection is split by its component, which keeps the function.
            for held in [held for held, module in mlp._modules.items() if module is function]:
                del mlp._modules[held]
                vars(mlp)[held] = component  # no second name of its hook points
            mlp.add_module("act", component)
            mlp.real_components["act"] = (name, component)
            return True
    return False


def _attach_experts(mlp: Any) -> bool:
    """Have X of a layer's experts pass through a hooked `act` component."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    known = experts.experts_of(mlp)
    if "act" in mlp._modules or known is None:
        return False
    component = GeneralizedComponent(name="experts")
    component.set_original_component(experts.neurons_of(known))
    mlp.add_module("act", component)
    return experts.install(mlp, component)


def has_adapter(architecture: str) -> bool:
    """Whether TransformerLens or an installed package has an adapter for a model class.

    One that was registered because another such model has been read is none.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    from miner_lens.models.adapter import ReadArchitectureAdapter

    ArchitectureAdapterFactory.discover_entry_points()
    known = ArchitectureAdapterFactory._adapters.get(architecture)
    return known is not None and known is not ReadArchitectureAdapter


def require_class(architecture: str) -> None:
    """Refuse a model class that nobody knows, before its weights are loaded.

    Raises:
        ValueError: Neither transformers nor an adapter knows it.
    """
    if not has_adapter(architecture) and not hasattr(transformers, architecture):
        raise ValueError(
            UNKNOWN.format(architecture=architecture, why="transformers has no such class")
        )


def _require_adapter(hf_model: Any) -> None:
    """Have TransformerLens read a model that it has no adapter for off the model itself.

    Raises:
        ValueError: There is no adapter, and the model hides its parts.
    """
    architecture = type(hf_model).__name__
    if has_adapter(architecture):
        return
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    from miner_lens.models.adapter import ReadArchitectureAdapter, decoder_parts

    try:
        decoder_parts(hf_model)
    except ValueError as error:
        why = f"it cannot be read off the model: {error}"
        raise ValueError(UNKNOWN.format(architecture=architecture, why=why)) from error
    ArchitectureAdapterFactory.register_adapter(architecture, ReadArchitectureAdapter)
