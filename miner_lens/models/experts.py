"""The neurons of a layer's experts, side by side as those of one MLP.

A neuron is a hidden unit of one expert. A layer counts them expert by expert, so that neuron
`expert * units + unit` is what `divmod(neuron, units)` says. Its X at a token is what the expert's
activation function gives there, and 0 where the router does not send the token to it.

transformers computes all experts of a layer in one module, which calls the activation function on
routed tokens alone. While X is read or written, the forward installed here lays these out as
[batch pos neuron], hands them to `ExpertNeurons`, and goes on with what comes back at routed
tokens. What is written elsewhere has no effect, as no expert computes there.

Some experts have no activation module, but a function of gate and up together, with clamps and
offsets of its own (GPT-OSS). Where that is a product of X and something that the gate has no part
in, X is told from it; see `_Product`. Others are given every token, multiplied by what the router
gives the expert (Llama 4): where that is 0, so is X.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

from miner_lens.models.holders import held, is_held
from miner_lens.models.hook import ContextHook
from miner_lens.models.structure import ACTIVATION_NAMES, MLP, children, plain

# Those of models whose experts have no forward of ours.
_neurons: weakref.WeakKeyDictionary[nn.Module, ExpertNeurons] = weakref.WeakKeyDictionary()
# Whether experts without an activation module have X all the same.
_checked: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


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
        # Those that are given every token have their weights so, and do not say it.
        return bool(getattr(self.experts, "is_transposed", True))


def experts_of(block: Any) -> Any:
    """The experts in a layer's MLP, or None where it has none whose neurons can be reached.

    They can where transformers' experts interface computes them, with a gate that multiplies, or
    where they are given every token, and their activation function is a module.
    """
    experts = children(block).get("experts") if isinstance(block, nn.Module) else None
    weights = [getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")]
    stacked = all(isinstance(one, Tensor) and one.ndim == 3 for one in weights)
    if not stacked:
        return None
    if _takes_all(experts):
        return experts
    if not getattr(experts, "has_gate", False):
        return None
    return experts if _activation(experts) is not None or _multiplies(experts) else None


def _takes_all(experts: Any) -> bool:
    """Whether experts are given every token, [expert x token d_model], and route none."""
    alone = list(signature(type(experts).forward).parameters) == ["self", "hidden_states"]
    return alone and not hasattr(experts, "has_gate") and _activation(experts) is not None


def _activation(experts: Any) -> Any:
    """The module whose output is X, or None where there is none."""
    gate = getattr(type(experts), "_apply_gate", _default_apply_gate)
    if gate is not _default_apply_gate:
        return None
    below = children(experts)
    return next((below[name] for name in ACTIVATION_NAMES if name in below), None)


class _Product:
    """What experts make of gate and up: X times a factor that does not depend on the gate.

    It is linear in up wherever nothing is clamped, so X is what it gains when up goes from 0 to 1,
    whatever is added to up before. The factor is what it is of a gate of 1, over X there.

    Args:
        experts: The experts.
        gate_up: What their first projection gives.
    """

    def __init__(self, experts: Any, gate_up: Float[Tensor, "routed gate_up"]) -> None:
        self._experts, joined = experts, experts.is_concatenated
        gate, up = gate_up.chunk(2, -1) if joined else (gate_up[..., ::2], gate_up[..., 1::2])
        one = torch.ones_like(gate)
        self.out: Float[Tensor, "routed unit"] = type(experts)._apply_gate(experts, gate_up)
        self.x = self._gained(gate)
        self.factor = self._of(one, up) / self._gained(one)

    def __call__(self, x: Float[Tensor, "routed unit"]) -> Float[Tensor, "routed unit"]:
        """What they make of another X; of the same one what they made, to the last bit."""
        product = x * self.factor
        value = torch.where(x == self.x, self.out, product)
        # The value is exact, as close numbers differ exactly, and the gradient is the product's.
        return product + (value - product).detach()

    def _gained(self, gate: Tensor) -> Tensor:
        return self._of(gate, torch.ones_like(gate)) - self._of(gate, torch.zeros_like(gate))

    def _of(self, gate: Tensor, up: Tensor) -> Tensor:
        parts = [gate, up]
        both = torch.cat(parts, -1)
        if not self._experts.is_concatenated:
            both = torch.stack(parts, -1).flatten(-2)
        made: Tensor = type(self._experts)._apply_gate(self._experts, both)
        return made


def _multiplies(experts: Any) -> bool:
    """Whether what experts make of gate and up is a product of X and something without it."""
    if experts not in _checked:
        lots = torch.Generator().manual_seed(0)
        try:
            made = _Product(experts, torch.randn(16, 16, generator=lots))
            _checked[experts] = torch.allclose(made.x * made.factor, made.out, atol=1e-5)
        except (RuntimeError, TypeError, AttributeError):
            _checked[experts] = False
    return _checked[experts]


def expert_mlp(block: Any) -> MLP:
    """The MLP that a layer's experts make up together."""
    experts = experts_of(block)
    before, down = (
        ExpertProjection(plain(block), experts, name) for name in ("gate_up_proj", "down_proj")
    )
    return MLP(neurons_of(experts), before, down)


def install(block: Any, around: nn.Module | None = None) -> bool:
    """Have X of a layer's experts pass by; whether it did not before.

    Args:
        block: The module that routes tokens to them.
        around: A TransformerLens component around an `ExpertNeurons`, to be called in its place.
    """
    experts = experts_of(block)
    former = None if experts is None else _installed(experts)
    if experts is None or (former is not None and around is None):
        return False
    forward = _forward_of_all if _takes_all(experts) else _forward
    vars(experts)[_place(experts)] = partial(forward, experts, around or neurons_of(experts))
    if former is None:
        plain(block).register_forward_pre_hook(_note_shape)
    return True


def uninstall(block: Any) -> None:
    """Undo `install`; where a context needs it, undo `around` alone."""
    experts = experts_of(block)
    if experts is None or _installed(experts) is None:
        return
    _neurons[experts] = neurons_of(experts)
    if is_held(("experts", plain(block))):
        install(block, _neurons[experts])
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
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(held(("experts", block), partial(_passing, block)))
        yield


def neurons_of(experts: nn.Module) -> ExpertNeurons:
    """Where X of all experts of a layer passes by."""
    installed = _installed(experts)
    if installed is None:
        return _neurons.setdefault(experts, ExpertNeurons())
    found: ExpertNeurons = plain(installed)
    return found


@contextmanager
def _passing(block: nn.Module) -> Iterator[None]:
    install(block)
    try:
        yield
    finally:
        if isinstance(_installed(experts_of(block)), ExpertNeurons):  # in no bridge
            uninstall(block)


def _place(experts: nn.Module) -> str:
    """Where a module keeps the forward that is to be run: accelerate has one of its own before."""
    return "_old_forward" if "_old_forward" in vars(experts) else "forward"


def _installed(experts: nn.Module) -> Any:
    """What X passes through, by the forward that was installed; None without one."""
    # A partial, because a deep copy of it belongs to the copy of the experts.
    held = vars(experts).get(_place(experts))
    if isinstance(held, partial) and held.func in (_forward, _forward_of_all):
        return held.args[1]
    return None


def _note_shape(block: Any, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of the module that routes tokens."""
    neurons_of(experts_of(block)).shape = args[0].shape[:-1]


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
    count = len(hidden_states)
    shape = _shape(passed, count)

    def through(x: Float[Tensor, "routed unit"]) -> Tensor:
        laid = x.new_zeros(count, experts.num_experts, x.shape[-1])
        laid[tokens, chosen] = x
        back: Tensor = passed(laid.view(*shape, -1))
        return back.reshape(laid.shape)[tokens, chosen]

    with _replaced(experts, through):
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def _forward_of_all(
    experts: Any, passed: nn.Module, hidden_states: Float[Tensor, "expert_token d_model"]
) -> Float[Tensor, "expert_token d_model"]:
    """The same of experts that are given every token."""
    if not _is_hooked(passed):
        own: Tensor = type(experts).forward(experts, hidden_states)
        return own
    shape = _shape(passed, len(hidden_states) // experts.num_experts)

    def through(x: Float[Tensor, "expert token unit"]) -> Tensor:
        laid = x.transpose(0, 1)
        back: Tensor = passed(laid.reshape(*shape, -1))
        return back.reshape(laid.shape).transpose(0, 1)

    with _replaced(experts, through):
        made: Tensor = type(experts).forward(experts, hidden_states)
        return made


def _shape(passed: nn.Module, count: int) -> torch.Size:
    """Batch and pos of so many tokens."""
    shape: torch.Size = plain(passed).shape
    # Somebody may call the experts by themselves.
    return shape if shape.numel() == count else torch.Size((1, count))


@contextmanager
def _replaced(experts: Any, through: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have experts go on with what a function makes of X."""
    activation = _activation(experts)
    if activation is not None:
        handle = activation.register_forward_hook(lambda module, args, x: through(x))
        try:
            yield
        finally:
            handle.remove()
        return

    def gate(gate_up: Tensor) -> Tensor:
        made = _Product(experts, gate_up)
        return made(through(made.x))

    vars(experts)["_apply_gate"] = gate
    try:
        yield
    finally:
        del vars(experts)["_apply_gate"]


def _is_hooked(module: nn.Module) -> bool:
    hooks = (
        hook
        for one in module.modules()
        for some in (one._forward_hooks, one._forward_pre_hooks, one._backward_hooks)
        for hook in some.values()
    )
    return any(not isinstance(hook, ContextHook) or hook.applies() for hook in hooks)
