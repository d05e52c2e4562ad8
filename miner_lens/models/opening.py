"""Hook points in towers: X, and queries and keys after RoPE, whoever made the bridge.

TransformerLens's own adapters open some towers, wrap others opaquely and leave out the activation
function. What is missing is added here.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.component_setup import setup_submodules
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from miner_lens.models.adapter import tower_parts
from miner_lens.models.sites import HOOKS
from miner_lens.models.structure import Stack, joined, part, plain, stacks


class HeadsLast(BaseTensorConversion):  # type: ignore[misc]
    """From [item head row d_head], as Hugging Face has it, to [item row head d_head], and back."""

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        """To TransformerLens's order."""
        return input_value.transpose(1, 2)

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        """To Hugging Face's order."""
        return input_value.transpose(1, 2)


def open_towers(bridge: Any, hf_model: Any) -> bool:
    """Give every tower of a bridge the hook points that mining needs; whether any was missing."""
    added = False
    for stack in stacks(hf_model):
        added |= _open_blocks(bridge, hf_model, stack)
        for layer in stack.layers:
            added |= _ensure(bridge, hf_model, layer.activation, "act")
            if layer.attention is None or stack.site == "projector":
                continue
            added |= _ensure(bridge, hf_model, layer.attention, "attn")
            component, _ = nearest(bridge, hf_model, layer.attention)
            for name in HOOKS:
                if not hasattr(component, name):
                    component.add_module(name, HookPoint())
                    getattr(component, name).hook_conversion = HeadsLast()
                    added = True
    return added


def nearest(bridge: Any, hf_model: Any, path: str) -> tuple[Any, list[str]]:
    """The innermost component around a place of the model, and the names from there to it."""
    found, names, raw = bridge, path.split("."), hf_model
    rest = names
    for number, name in enumerate(names):
        raw = plain(raw)._modules[name]
        if isinstance(raw, GeneralizedComponent):
            found, rest = raw, names[number + 1 :]
    return found, rest


def _open_blocks(bridge: Any, hf_model: Any, stack: Stack) -> bool:
    """Where a tower is wrapped as a whole, wrap its blocks as well."""
    if stack.blocks is None:
        return False
    component, rest = nearest(bridge, hf_model, joined(stack.blocks, "0"))
    if (
        not rest
        or component is bridge
        or component.original_component is not part(hf_model, stack.module)
    ):
        return False
    parts = {"blocks": tower_parts(hf_model, stack)["blocks"]}
    before, component.submodules = component.submodules, parts
    setup_submodules(component, bridge.adapter, component.original_component)
    component.submodules = before | parts
    return True


def _ensure(bridge: Any, hf_model: Any, path: str, name: str) -> bool:
    """Put a component around a module, if there is none."""
    component, rest = nearest(bridge, hf_model, path)
    if not rest:
        return False
    around = GeneralizedComponent(name=".".join(rest))
    around.set_original_component(part(hf_model, path))
    holder, _, last = path.rpartition(".")
    setattr(part(hf_model, holder), last, around)
    # Several modules of an opaque component cannot all have the short name.
    name = "_".join([*rest[:-1], name]) if name in component._modules or len(rest) > 2 else name
    # Not by add_module, as a component has all attributes of what it is around.
    component._modules[name] = around
    if isinstance(component, GeneralizedComponent):
        component.real_components[name] = (".".join(rest), around)
    return True
