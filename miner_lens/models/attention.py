"""Queries and keys after RoPE, at TransformerLens's own hook points, while attention stays fused.

TransformerLens gives every rotary attention of a decoder `hook_rot_q` and `hook_rot_k`, and
`miner_lens.models.opening` those of towers, but where the Hugging Face attention is kept
(multimodal RoPE needs that) nothing fires them. Hugging Face has attention computed from queries
and keys after RoPE by the function that `AttentionInterface.get_interface` returns. What it returns
is called through `_attend` here, which fires those hook points for modules that are in a bridge and
does nothing for others. The name of the function stays: some families ask for it, and mask by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import (
    create_position_bias_mask,
    sdpa_attention_forward,
)

from miner_lens.models.inside import hf_model_of
from miner_lens.models.sites import HOOKS, Tower, sites
from miner_lens.models.structure import children

REBUILT = (
    "TransformerLens rebuilds this model's attention, with a [head, query, key] tensor in every "
    "layer, instead of keeping Hugging Face's own. Scores are the same, but take more time and "
    "memory; an adapter with TransformerLens's plain AttentionBridge and "
    "maintain_native_attention=True would spare them."
)

# The method by which TransformerLens rotates where queries, keys and values are one projection.
ROTATE = "_apply_rotary_pos_emb"

Output = tuple[Tensor, Tensor | None]

# Where a Hugging Face attention keeps the bridge around it: not among its modules, and not in a
# table of ours, which a deep copy would not be in.
BRIDGE = "_miner_lens_bridge"
# And what it has multiplied QK^T by; some have it in the queries already, and multiply by 1.
SCALE = "_miner_lens_scale"
# And the `Call` that is running, while hooks see its queries and keys.
CALL = "_miner_lens_call"
# What tells that transformers' interface is hooked.
HOOKED = "_miner_lens_hooked"


@dataclass
class Call:
    """What the function of native attention is told beside queries and keys.

    Attributes:
        mask: [batch head query key], True or 0 where a query sees a key, or None.
        causal: Whether a query sees no later keys where there is no mask.
        explicit: Whether the pattern is more than a softmax of what queries, keys and mask add up
            to, as with sinks and soft caps, so that only the family's own function has it.
        readers: Are given such a pattern, [batch head query key], once it is there.
    """

    mask: Tensor | None
    causal: bool
    explicit: bool
    readers: list[Callable[[Tensor], None]] = field(default_factory=list)


def call_of(attention: Any) -> Call | None:
    """The call of a layer's native attention whose queries and keys hooks are seeing."""
    call: Call | None = vars(attention.original_component).get(CALL)
    return call


def is_causal(attention: Any, options: Mapping[str, Any]) -> bool:
    """Return True if queries see no later keys where attention is called without a mask.

    Args:
        attention: The Hugging Face module.
        options: What the call says.
    """
    said = options.get("is_causal")
    return bool(getattr(attention, "is_causal", True) if said is None else said)


def attentions_of(bridge: Any) -> list[Any]:
    """The decoder's attention components, one per layer that has one."""
    return [block.attn for block in bridge.blocks if "attn" in block._modules]


def tower_attentions(bridge: Any) -> list[Any]:
    """The attention components of all towers, which leave attention to Hugging Face."""
    towers = [place for place in sites(hf_model_of(bridge)).values() if isinstance(place, Tower)]
    found = (one for tower in towers for one in tower.attentions())
    return [one for one in found if one is not None and _delegates(one)]


def rebuilt(attentions: list[Any]) -> list[Any]:
    """Those that TransformerLens computes itself, instead of keeping Hugging Face's own."""
    return [bridge for bridge in attentions if not _is_native(bridge)]


def unreadable(bridge: Any) -> str | None:
    """Why no hook point has a decoder's queries and keys as they are multiplied; None where it has.

    They are computed by neither Hugging Face's interface nor TransformerLens, or normed after RoPE,
    or choose which keys they look at (DeepSeek's sparse attention), or a layer has none, as with
    linear attention.
    """
    for layer, block in enumerate(bridge.blocks):
        one = block._modules.get("attn")
        if one is None:
            parts = ", ".join(children(block))
            return f"layer {layer} has no attention by queries and keys, but {parts}"
        if _is_native(one) and _config(one) is None:
            return f"layer {layer} computes attention outside transformers' interface"
        if not _is_native(one) and getattr(one.config, "qk_norm_after_rope", False):
            return f"layer {layer} norms them after RoPE"
        if hasattr(one, "hook_topk_indices"):
            return f"layer {layer} chooses which keys are looked at"
    return None


def rotated_points(bridge: Any, layer: int) -> tuple[str, str]:
    """Hook points of a decoder layer's queries and keys, as attention multiplies them."""
    attention = bridge.blocks[layer]._modules.get("attn")
    if hasattr(attention, "hook_kv_latent"):
        # With latent attention, the usual ones have the part that is rotated alone.
        return f"blocks.{layer}.attn.hook_q", f"blocks.{layer}.attn.hook_k"
    return f"blocks.{layer}.attn.hook_rot_q", f"blocks.{layer}.attn.hook_rot_k"


def scale_of(attention: Any) -> float | None:
    """What a layer's attention multiplies QK^T by, or None where its module does not say.

    Of native attention it is what the last call said.
    """
    module = getattr(attention, "original_component", None) or attention
    scale = vars(module).get(SCALE, getattr(module, "scaling", None))
    return float(scale) if isinstance(scale, int | float) else None


def install(bridge: Any) -> None:
    """Make native attention fire `hook_rot_q` and `hook_rot_k`, in the decoder and in towers.

    Idempotent. The computation stays what the config names, bit for bit; with sdpa, a layer whose
    `hook_pattern` is being read computes its pattern explicitly. Attention that TransformerLens
    rebuilds fires the hooks already, but for that with one projection for queries, keys and
    values, of which the rotation is made to.
    """
    if not hasattr(AttentionInterface.get_interface, HOOKED):
        AttentionInterface.get_interface = _through(  # type: ignore[method-assign]
            AttentionInterface.get_interface
        )
    for one in _native(bridge):
        vars(one.original_component)[BRIDGE] = one
    for one in rebuilt(attentions_of(bridge)):
        if hasattr(one, ROTATE) and hasattr(one, HOOKS[0]):
            # A partial, because a deep copy of it belongs to the copy.
            vars(one)[ROTATE] = partial(_rotate, one)


def uninstall(bridge: Any) -> None:
    """Take what `install` left on a model's modules off them."""
    for one in _native(bridge):
        for name in (BRIDGE, SCALE):
            vars(one.original_component).pop(name, None)


@contextmanager
def fused(bridge: Any) -> Iterator[None]:
    """Compute native attention fused where the model can, whatever its own setting is.

    Eager attention would take memory for its pattern, and other functions (flash attention) have
    other masks. A part that has no fused attention, such as one with soft caps, computes its own
    eager one. The model's setting comes back afterwards. Attention that TransformerLens rebuilds
    cannot be fused; its own hooks are used, and a warning says so.
    """
    if rebuilt(attentions_of(bridge)):
        warnings.warn(REBUILT, stacklevel=2)
    configs = _fusible(bridge)
    former = [config._attn_implementation for config, _ in configs]
    try:
        for config, name in configs:
            name_function(config, name)
        yield
    finally:
        for (config, _), name in zip(configs, former, strict=True):
            name_function(config, name)


def name_function(config: Any, name: str) -> None:
    """Have a config name an attention function; its setter would set the configs below it too."""
    own = "_attn_implementation_internal"
    setattr(config, own if hasattr(config, own) else "_attn_implementation", name)


def _fusible(bridge: Any) -> list[tuple[Any, str]]:
    """The configs of native attention, each once, with what transformers would have them name."""
    owners = {
        module: model  # the innermost, as it comes last
        for model in hf_model_of(bridge).modules()
        if isinstance(model, PreTrainedModel)
        for module in model.modules()
    }
    names: dict[int, tuple[Any, str]] = {}
    for one in _native(bridge):
        module = one.original_component
        if module in owners:
            name = owners[module].get_correct_attn_implementation(None)
            names.setdefault(id(module.config), (module.config, name))
    return list(names.values())


def _native(bridge: Any) -> list[Any]:
    decoder = [one for one in attentions_of(bridge) if _config(one) is not None]
    return decoder + tower_attentions(bridge)


def _delegates(component: Any) -> bool:
    """Whether a tower's attention is Hugging Face's own, by the interface that its config names."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    forward = type(component).forward
    own = forward is GeneralizedComponent.forward or forward is AttentionBridge.forward
    config = getattr(component.original_component, "config", None)
    return own and hasattr(config, "_attn_implementation")


def _is_native(bridge: Any) -> bool:
    """Whether TransformerLens leaves an attention to the model."""
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    # Subclasses that rebuild attention set maintain_native_attention as well.
    native = getattr(type(bridge), "forward", None) is AttentionBridge.forward
    return native and bool(bridge.maintain_native_attention)


def _config(bridge: Any) -> Any:
    """The config of an attention that Hugging Face's interface computes, or None."""
    if not _is_native(bridge):
        return None
    return getattr(bridge.original_component, "config", None)


def _rotate(attention: Any, *given: Any) -> tuple[Tensor, Tensor]:
    """The rotation of attention that TransformerLens rebuilds, with hooks on what it gives."""
    query, key = getattr(type(attention), ROTATE)(attention, *given)
    return attention.hook_rot_q(query), attention.hook_rot_k(key)


def _additive(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Turn the mask that sdpa takes (boolean, or None with a causal flag) into one to add."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if queries == 1 or not causal:
            return None
        # As sdpa has it, also where a static cache has room for more keys.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)


def _through(get_interface: Callable[..., Any]) -> Callable[..., Any]:
    """Have what `AttentionInterface.get_interface` returns called through `_attend`."""

    @wraps(get_interface)
    def hooked(interface: Any, attn_implementation: Any, default: Any) -> Any:
        function = get_interface(interface, attn_implementation, default)
        return partial(_attend, function, default)

    setattr(hooked, HOOKED, True)
    return hooked


def _attend(
    function: Callable[..., Output],
    eager: Callable[..., Output],
    module: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Output:
    """Compute attention by a function, with hooks on queries and keys.

    Args:
        function: What computes attention.
        eager: The model family's own eager attention, with its own soft caps or sinks.
        module: The attention module; in no bridge, nothing else is done.
        args: Queries, keys, values and the mask, as the family gives them.
        kwargs: More of these, and options.
    """
    bridge = vars(module).get(BRIDGE)
    if bridge is None or not hasattr(bridge, HOOKS[0]):
        return function(module, *args, **kwargs)
    return _hooked(bridge, function, eager, module, *args, **kwargs)


def _hooked(
    bridge: Any,
    function: Callable[..., Output],
    eager: Callable[..., Output],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> Output:
    if options.get("scaling") is not None:
        vars(module)[SCALE] = options["scaling"]
    causal = is_causal(module, options) and query.shape[2] > 1
    call = Call(attention_mask, causal, explicit=function is not sdpa_attention_forward)
    if not call.explicit and (bias := options.get("position_bias")) is not None:
        call.mask = create_position_bias_mask(bias, attention_mask, causal, query, key)
    vars(module)[CALL] = call
    try:
        query, key = bridge.hook_rot_q(query), bridge.hook_rot_k(key)
    finally:
        del vars(module)[CALL]
    if not call.explicit and _reads_pattern(bridge):
        function, attention_mask = eager, _additive(attention_mask, causal, query, key)
    output = function(module, query, key, value, attention_mask, **options)
    if (pattern := output[1]) is not None:
        for read in call.readers:
            read(pattern.detach())
    return output


def _reads_pattern(bridge: Any) -> bool:
    points = (getattr(bridge, name, None) for name in ("hook_pattern", "hook_attn_scores"))
    return any(point is not None and point.has_hooks() for point in points)
