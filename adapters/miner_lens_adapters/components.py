"""TransformerLens components that several families have, by what their modules are called."""

from __future__ import annotations

from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


def linear(**modules: str) -> dict[str, GeneralizedComponent]:
    """Linear layers: `linear(q="q_proj")` names the module `q_proj` as `q`."""
    return {name: LinearBridge(name=module) for name, module in modules.items()}


def plain_mlp(fc1: str, act: str, fc2: str) -> dict[str, GeneralizedComponent]:
    """Two linear layers, and between them the activation function whose output is X."""
    return {**linear(fc1=fc1), "act": GeneralizedComponent(name=act), **linear(fc2=fc2)}
