"""The neurons of a layer's experts, side by side as those of one MLP.

A neuron is a hidden unit of one expert. A layer counts them expert by expert, so that neuron
`expert * units + unit` is what `divmod(neuron, units)` says. Its X at a token is what the expert's
activation function gives there, and 0 where the router does not send the token to it.

transformers computes all experts of a layer in one module, which calls the activation function on
routed tokens alone. While X is read or written, the forward installed here lays these out as
[batch pos neuron], hands them to `ExpertNeurons`, and goes on with what comes back at routed
tokens. What is written elsewhere has no effect, as no expert computes there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

from miner_lens.models.structure import ACTIVATION_NAMES, MLP, children, plain

# Those of models whose experts have no forward of ours.
_neurons: weakref.WeakKeyDictionary[nn.Module, ExpertNeurons] = weakref.WeakKeyDictionary()


class ExpertNeurons(nn.Module):
    """Where X of all experts of a layer passes by, [batch pos neuron]; it returns what it gets."""

    def __init__(self) -> None:
        super().__init__()
        # Batch and pos of the pass that is running; experts see tokens alone.
        self.shape = torch.Size()

    def forward(self, x: Tensor) -> Tensor:
        """As it is."""
        return x


@dataclass(frozen=True)
class ExpertProjection:
    """One projection of a layer's experts, with what is asked of a linear layer.

    Attributes:
        block: The module that routes tokens to the experts.
        experts: The experts.
        name: `"gate_up_proj"` or `"down_proj"`.
    """

    block: nn.Module
    experts: Any
    name: str

    @property
    def count(self) -> int:
        """How many experts there are."""
        return int(self.experts.num_experts)

    @property
    def in_features(self) -> int:
        """Of the down projection: the neurons of all experts."""
        return self.count * int(self.experts.down_proj.shape[1 if self._transposed else 2])

    @property
    def weight(self) -> Float[Tensor, "d_model expert unit"]:
        """The weight; of the down projection, `flatten(1)` is that of one linear layer."""
        weight: Tensor = getattr(self.experts, self.name)
        return weight.permute(2, 0, 1) if self._transposed else weight.permute(1, 0, 2)

    def parameters(self) -> Iterator[Tensor]:
        """The weight as the model has it."""
        yield getattr(self.experts, self.name)

    def without(self, weight: Tensor, index: Int[Tensor, " neuron"]) -> Tensor:
        """A down projection with the columns of these neurons zero."""
        weight = weight.clone()
        index = index.to(weight.device)
        units = weight.transpose(1, 2) if self._transposed else weight
        expert, unit = index // units.shape[2], index % units.shape[2]
        units[expert, :, unit] = 0
        return weight

    @property
    def _transposed(self) -> bool:
        return bool(self.experts.is_transposed)


def experts_of(block: Any) -> Any:
    """The experts in a layer's MLP, or None where it has none whose neurons can be reached.

    They can where transformers' experts interface computes them, with a gate and an activation
    function that is a module.
    """
    experts = children(block).get("experts") if isinstance(block, nn.Module) else None
    weights = [getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")]
    stacked = all(isinstance(one, Tensor) and one.ndim == 3 for one in weights)
    if not stacked or not getattr(experts, "has_gate", False) or _activation(experts) is None:
        return None
    return experts


def _activation(experts: Any) -> Any:
    below = children(experts)
    return next((below[name] for name in ACTIVATION_NAMES if name in below), None)


def expert_mlp(block: Any) -> MLP:
    """The MLP that a layer's experts make up together."""
    experts = experts_of(block)
    before, down = (
        ExpertProjection(plain(block), experts, name) for name in ("gate_up_proj", "down_proj")
    )
    return MLP(_neurons_of(experts), before, down)


def install(block: Any, around: nn.Module | None = None) -> bool:
    """Have X of a layer's experts pass by; whether it did not before.

    Args:
        block: The module that routes tokens to them.
        around: A TransformerLens component around an `ExpertNeurons`, to be called in its place.
    """
    experts = experts_of(block)
    if experts is None or _installed(experts) is not None:
        return False
    vars(experts)[_place(experts)] = partial(_forward, experts, around or _neurons_of(experts))
    plain(block).register_forward_pre_hook(_note_shape)
    return True


def uninstall(block: Any) -> None:
    """Undo `install`."""
    experts = experts_of(block)
    if experts is None or _installed(experts) is None:
        return
    place = _place(experts)
    if place == "forward":
        del vars(experts)[place]
    else:
        vars(experts)[place] = MethodType(type(experts).forward, experts)
    hooks = plain(block)._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _note_shape]:
        del hooks[key]


@contextmanager
def passing(mlps: Iterable[MLP]) -> Iterator[None]:
    """Have X of experts pass by while the context is open, also of a model in no bridge."""
    blocks = [mlp.down.block for mlp in mlps if isinstance(mlp.down, ExpertProjection)]
    installed = [block for block in blocks if install(block)]
    try:
        yield
    finally:
        for block in installed:
            uninstall(block)


def _neurons_of(experts: nn.Module) -> ExpertNeurons:
    installed = _installed(experts)
    if installed is None:
        return _neurons.setdefault(experts, ExpertNeurons())
    found: ExpertNeurons = plain(installed)
    return found


def _place(experts: nn.Module) -> str:
    """Where a module keeps the forward that is to be run: accelerate has one of its own before."""
    return "_old_forward" if "_old_forward" in vars(experts) else "forward"


def _installed(experts: nn.Module) -> Any:
    """What X passes through, by the forward that was installed; None without one."""
    # A partial, because a deep copy of it belongs to the copy of the experts.
    held = vars(experts).get(_place(experts))
    return held.args[1] if isinstance(held, partial) and held.func is _forward else None


def _note_shape(block: Any, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of the module that routes tokens."""
    _neurons_of(experts_of(block)).shape = args[0].shape[:-1]


def _forward(
    experts: Any,
    passed: nn.Module,
    hidden_states: Float[Tensor, "token d_model"],
    top_k_index: Int[Tensor, "token choice"],
    top_k_weights: Float[Tensor, "token choice"],
) -> Float[Tensor, "token d_model"]:
    """The forward of experts whose X passes through a module, wherever somebody hooks that."""
    if not _is_hooked(passed):
        own: Tensor = type(experts).forward(experts, hidden_states, top_k_index, top_k_weights)
        return own
    # The function below sorts the same, and so calls the activation function in this order.
    chosen, order = top_k_index.flatten().sort()
    tokens = order // top_k_index.shape[1]
    count, shape = len(hidden_states), plain(passed).shape
    if shape.numel() != count:  # somebody calls the experts by themselves
        shape = torch.Size((1, count))

    def through(_: Any, __: Any, x: Float[Tensor, "routed unit"]) -> Tensor:
        laid = x.new_zeros(count, experts.num_experts, x.shape[-1])
        laid[tokens, chosen] = x
        back: Tensor = passed(laid.view(*shape, -1))
        return back.reshape(laid.shape)[tokens, chosen]

    handle = _activation(experts).register_forward_hook(through)
    try:
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    finally:
        handle.remove()


def _is_hooked(module: nn.Module) -> bool:
    return any(
        one._forward_hooks or one._forward_pre_hooks or one._backward_hooks
        for one in module.modules()
    )
