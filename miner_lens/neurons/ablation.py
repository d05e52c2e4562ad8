"""Switch neurons off, and leave no trace of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from miner_lens.data.signature import described
from miner_lens.models import sites
from miner_lens.models.access import identity, layout, mlps
from miner_lens.models.bridge import PassInputs, pass_inputs, prepare
from miner_lens.models.devices import offloaded_weights
from miner_lens.models.experts import ExpertProjection, passing
from miner_lens.models.hook import ContextHook
from miner_lens.models.inside import (
    bare,
    compiled,
    hf_model_of,
    is_bridge,
    is_compiled,
    uncompiled,
)
from miner_lens.models.sites import Tower
from miner_lens.models.structure import MLP, plain
from miner_lens.neurons.active import noted
from miner_lens.neurons.context_hooks import ContextHooks
from miner_lens.neurons.neuron_set import NeuronSet


@dataclass(frozen=True)
class Times:
    """What `scale` has written: X times a number.

    Attributes:
        by: The number.
    """

    by: float


Value = float | Literal["zero", "min", "mean"] | Times
Hook = tuple[str, Callable[..., Tensor | None]]
Neurons = NeuronSet | Mapping[str, NeuronSet]


@contextmanager
def ablate(
    model: Any,
    neurons: Neurons,
    value: Value = "zero",
    at: str | None = None,
    complement: bool = False,
) -> Iterator[None]:
    """Switch neurons off while the context is open.

    Writes into X, the output of the MLP's activation function, before it is multiplied by the up
    projection. Contexts nest, the inner one on top of the outer; hooks, caches and generation
    inside see the ablated model, and `reset_hooks()` does not end it. A copy of the model that is
    made meanwhile is intact. Afterwards the model computes what it computed before, bit for bit,
    also after an exception. A warning says so where the model ran and nothing was written.

    Args:
        model: A `TransformerBridge` or a plain Hugging Face model, also inside torch.compile,
            DistributedDataParallel or PEFT. Compiled models run uncompiled while the context is
            open, as compiled code passes by hooks.
        neurons: The neurons, or what `select` returns, which means all of them.
        value: `"zero"`, a number, `"min"` (the smallest X of the layer in the same pass, over
            the sample's real tokens; in a tower, over the same image, video or clip) or `"mean"`
            (each neuron's mean when it was mined; not of experts, whose neurons are written at the
            tokens that the router sends them).
        at: Only at the tokens of this modality; default everywhere. In a tower, where only its
            own medium occurs, leave it out.
        complement: Ablate every neuron of the site but these.

    Raises:
        ValueError: The neurons are another model's, carry no means for `"mean"` or several, or are
            experts' and it is asked for, the model has no such modality, or its weights are on the
            meta device and not offloaded.

    Example:
        with ml.ablate(model, msns["image"]):
            logits = model(**inputs)
    """
    write = _Write(check_neurons(model, neurons), value, at, complement)
    tokens = _tokens(model, write)
    layers, hf_model = mlps(model, write.site), hf_model_of(model)
    write.check(layers)
    hooks = ContextHooks()
    with ExitStack() as open_:
        open_.enter_context(passing(layers))
        open_.enter_context(uncompiled())
        open_.enter_context(noted(hf_model, write.described()))
        open_.callback(tokens.stop)
        if write.needs_tokens:
            tokens.watch(model)
        open_.callback(hooks.remove)
        for layer, target in write.targets(layers, hf_model).items():
            _write_into(layers[layer].activation, hooks, write, tokens, target)
        place = sites.find(hf_model, write.site)
        tower = [place.module(hf_model)] if isinstance(place, Tower) else []
        hooks.watch(tower or [hf_model, *compiled(model)])
        yield
        hooks.warn_if_idle(is_compiled(model), stacklevel=3)


def ablation_hooks(
    model: Any,
    neurons: Neurons,
    value: Value = "zero",
    at: str | None = None,
    complement: bool = False,
) -> list[Hook]:
    """The same ablation as a list for TransformerLens's `run_with_hooks(fwd_hooks=...)`.

    Args are those of `ablate`, but for `value="min"`, which needs to know which patches or frames
    are one sample's and so works in the decoder only.

    Raises:
        ValueError: As `ablate`, the model is not a `TransformerBridge`, or `value="min"` is asked
            for in a tower.
    """
    if not is_bridge(bare(model)):
        raise ValueError(
            f"ablation_hooks needs a TransformerBridge, got {type(model).__name__}. "
            "Wrap it with ml.wrap, or use ml.ablate, which takes plain Hugging Face models."
        )
    prepare(model)
    write = _Write(check_neurons(model, neurons), value, at, complement)
    tokens = _tokens(model, write)
    if isinstance(tokens, _TowerRows) and write.needs_tokens:
        raise ValueError(
            "ablation_hooks cannot write 'min' in a tower: hook points do not say which rows are "
            "one image or clip. Use ml.ablate, which can."
        )
    seen = pass_inputs(model)
    place = sites.find(hf_model_of(model), write.site)
    layers = mlps(model, write.site)
    write.check(layers)
    hooks: list[Hook] = []
    for layer, target in write.targets(layers, hf_model_of(model)).items():
        hooks.append((place.activation_point(layer), _point_hook(write, tokens, seen, target)))
    return hooks


def check_neurons(model: Any, neurons: Neurons) -> NeuronSet:
    """All of the neurons as one set that belongs to this model.

    Raises:
        ValueError: They are another model's, or no neurons at all but something else.
    """
    if isinstance(neurons, Mapping) and neurons:
        neurons = NeuronSet.union(neurons.values())
    if not isinstance(neurons, NeuronSet):
        raise ValueError(
            "neurons must be a NeuronSet or a non-empty mapping of modality to NeuronSet, as "
            f"select returns it, not {type(neurons).__name__}."
        )
    if neurons.identity is not None:
        neurons.identity.check(identity(model, neurons.site), "The NeuronSet")
        return neurons
    widths = [mlp.down.in_features for mlp in mlps(model, neurons.site)]
    shape = (len(widths), max(widths))
    if shape != (neurons.layers, neurons.neurons):
        raise ValueError(
            f"The NeuronSet is for {neurons.layers} layers x {neurons.neurons} neurons; this "
            f"model's {neurons.site} has {shape[0]} x {shape[1]}. Mine again on this model."
        )
    # Where layers have different numbers of neurons, only an identity says which there are.
    return (
        neurons
        if min(widths) == shape[1]
        else NeuronSet.from_mask(
            neurons.mask, identity(model, neurons.site), neurons.means, neurons.site
        )
    )


class _Tokens(PassInputs):
    """Knows of the pass that is running which tokens are real, and which are to be ablated."""

    def __init__(self, model: Any, at: str | None) -> None:
        super().__init__()
        self._looked_up: tuple[Tensor, Tensor] | None = None
        self.at = at
        self.layout = None if at is None else layout(model)
        if self.layout is not None:
            known = self.layout.masks(torch.zeros(1, 1, dtype=torch.long))
            if at not in known:
                raise ValueError(f"The model has no modality {at!r}; it has {', '.join(known)}.")

    def chosen(self) -> Bool[Tensor, "batch pos"] | None:
        """The tokens of the modality to ablate at, or None where it is everywhere."""
        if self.layout is None or self.at is None or self.ids is None:
            return None
        if self._looked_up is None or self._looked_up[0] is not self.ids:
            self._looked_up = (self.ids, self.layout.masks(self.ids, self.real)[self.at])
        return self._looked_up[1]

    def lowest(self, x: Float[Tensor, "batch pos neuron"]) -> Float[Tensor, "batch 1 1"]:
        """The smallest X of each sample's real tokens."""
        if self.real is not None:
            x = x.masked_fill(~self.real.to(x.device)[..., None], torch.inf)
        return x.amin(dim=(-2, -1), keepdim=True)

    def forget(self, *_: Any) -> None:
        """What was seen is of no later pass."""
        super().forget()
        self._looked_up = None


class _TowerRows(PassInputs):
    """Knows of the tower's call that is running which rows are real, and of which item each is."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self._arguments: dict[str, Any] | None = None
        self._hf_model: Any = None
        self._there: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def watch(self, model: Any) -> None:
        """See each call of the tower from now on."""
        hf_model = hf_model_of(model)
        module: Any = self.tower.module(hf_model)
        self._hf_model = hf_model
        signature = inspect.signature(plain(module).forward)

        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._arguments = signature.bind(*args, **kwargs).arguments
            self._there = None

        self.handles.append(module.register_forward_pre_hook(ContextHook(see), with_kwargs=True))

    def chosen(self) -> None:
        """In a tower every row is ablated."""

    def lowest(self, x: Float[Tensor, "*row neuron"]) -> Float[Tensor, "*row 1"]:
        """The smallest X of the image, video or clip that each row belongs to."""
        if self._arguments is None:
            raise ValueError(
                f"value='min' needs to see the {self.tower.name} tower called as a whole, to know "
                "which rows are one image, video or clip. Call the model or the whole tower, or "
                "give another value."
            )
        if self._there is None:
            # Once a call, not in every layer.
            rows = self.tower.rows(self._hf_model, self._arguments, x.shape)
            self._there = rows.items.to(x.device), rows.real.to(x.device)
            self._count = int(rows.items[-1]) + 1
        items, real = (tensor.to(x.device) for tensor in self._there)
        by_row = x.flatten(0, -2).amin(-1).masked_fill(~real, torch.inf)
        by_item = by_row.new_full((self._count,), torch.inf)
        by_item.scatter_reduce_(0, items, by_row, "amin")
        return by_item[items].view(*x.shape[:-1], 1)


def _tokens(model: Any, write: _Write) -> _Tokens | _TowerRows:
    place = sites.find(hf_model_of(model), write.site)
    if not isinstance(place, Tower):
        return _Tokens(model, write.at)
    if write.at is not None and (write.at,) != place.modalities:
        raise ValueError(
            f"at={write.at!r} chooses among the prompt's tokens, but neurons of site "
            f"{place.name!r} see only {' and '.join(place.modalities)}. Leave at out."
        )
    write.at = None
    return _TowerRows(place)


@dataclass(frozen=True)
class _Target:
    """Which neurons to write into in one layer.

    All tensors are brought to the layer's device when the context opens, so that no pass waits.

    Attributes:
        index: The neurons; where they are most of the layer, the others.
        others: Whether `index` has the others. To save those few, write all and put them back
            takes a tenth of the time of writing most neurons one by one.
        means: The mined means of the neurons to write, or of all; None where not needed.
    """

    index: Int[Tensor, " neuron"]
    others: bool
    means: Float[Tensor, " neuron"] | None


class _Write:
    """What to write into which neurons."""

    def __init__(self, neurons: NeuronSet, value: Value, at: str | None, complement: bool) -> None:
        if not isinstance(value, int | float | Times) and value not in ("zero", "min", "mean"):
            raise ValueError(f"value must be 'zero', 'min', 'mean' or a number, not {value!r}.")
        self.neurons = ~neurons if complement else neurons
        self.means = None
        if value == "mean":
            self.means = neurons.means
            if self.means is None:
                raise ValueError(
                    "value='mean' needs each neuron's mined mean, and this NeuronSet carries none. "
                    "Select it from scores that ml.mine computed, or give a number."
                )
            doubtful = int(self.means[self.neurons.mask].isnan().sum())
            if doubtful:
                raise ValueError(
                    f"value='mean' is not one value for {doubtful} of {len(self.neurons)} neurons: "
                    "the sets that were combined were mined on different data, with different "
                    "means. Open one ablation inside the other, or select all sets from the same "
                    "scores."
                )
        self.site = neurons.site
        self.value = value
        self.at = at

    def check(self, layers: list[MLP]) -> None:
        """Refuse the mean of experts.

        Raises:
            ValueError: As said.
        """
        if self.means is not None and any(isinstance(m.down, ExpertProjection) for m in layers):
            raise ValueError(
                "value='mean' is not defined for neurons of experts: the mined mean counts tokens "
                "that the router does not send to an expert as 0, and only at the others can it "
                "be written. Give a number, 'zero' or 'min'."
            )

    def described(self) -> Any:
        """What it does, as JSON can hold it."""
        where = {"site": self.site, "at": self.at, "neurons": self.neurons.by_layer()}
        return described(where | {"value": self.value, "means": self.means})

    @property
    def needs_tokens(self) -> bool:
        """Whether what is written, or where, depends on what the tokens are."""
        return self.at is not None or self.value == "min"

    def targets(self, layers: list[MLP], hf_model: Any) -> dict[int, _Target]:
        """Neurons by layer, on the device where the layer computes."""
        targets = {}
        offloaded = offloaded_weights(hf_model)
        for layer, index in self.neurons.by_layer().items():
            means = None if self.means is None else self.means[layer]
            width = layers[layer].down.in_features
            if means is not None:
                means = means[:width]
            others = 2 * len(index) > width
            if others:
                index = _others(index, width)
            elif means is not None:
                means = means[index]
            weight = next(iter(layers[layer].before.parameters()), None)
            # Packed weights are no parameters, and offloaded ones lie elsewhere than the layer
            # computes; `__call__` sees where.
            device = index.device
            if weight is not None and weight.device.type != "meta":
                device = weight.device
            elif weight is not None and id(weight) not in offloaded:
                raise ValueError(
                    f"The weights of layer {layer} are on the meta device, where nothing is "
                    "computed, so there is nothing to ablate. Load the model with its weights."
                )
            if means is not None:
                means = means.to(device)
            targets[layer] = _Target(index.to(device), others, means)
        return targets

    def __call__(
        self,
        x: Float[Tensor, "*row neuron"],
        target: _Target,
        tokens: _Tokens | _TowerRows,
    ) -> Float[Tensor, "*row neuron"]:
        index = target.index.to(x.device)
        chosen = tokens.chosen()
        if self.at is not None and (chosen is None or chosen.shape != x.shape[:-1]):
            raise ValueError(
                f"Ablating at {self.at!r} needs the token ids of this pass to tell modalities "
                "apart. Call the model with input_ids, not with inputs_embeds."
            )
        # Where gradients are wanted, what is read must not be what is written into.
        old, x = x, x.clone() if x.requires_grad else x
        new = self._new(old, target, tokens)
        mask = None if chosen is None else chosen.to(x.device)[..., None]
        if target.others:
            kept = _read(old, index)
            x.copy_(new if mask is None else torch.where(mask, new, old))
            return x.index_copy_(-1, index, kept)
        if mask is not None:
            new = torch.where(mask, new, _read(old, index))
        return x.index_copy_(-1, index, new.expand(*x.shape[:-1], len(index)))

    def _new(
        self, x: Float[Tensor, "*row neuron"], target: _Target, tokens: _Tokens | _TowerRows
    ) -> Tensor:
        """What to write, to be broadcast over rows."""
        if isinstance(self.value, Times):
            return (x if target.others else _read(x, target.index.to(x.device))) * self.value.by
        if self.value == "min":
            return tokens.lowest(x)
        if target.means is not None:
            return target.means.to(x.device, x.dtype)
        value = 0.0 if isinstance(self.value, str) else self.value
        return torch.full((), value, dtype=x.dtype, device=x.device)


def _read(x: Float[Tensor, "*row neuron"], index: Int[Tensor, " neuron"]) -> Tensor:
    # Several times as fast as index_select on a CPU.
    return x.gather(-1, index.expand(*x.shape[:-1], len(index)))


def _others(index: Int[Tensor, " neuron"], neurons: int) -> Int[Tensor, " neuron"]:
    mask = torch.ones(neurons, dtype=torch.bool)
    mask[index] = False
    return mask.nonzero()[:, 0]


def _write_into(
    module: Any,
    hooks: ContextHooks,
    write: _Write,
    tokens: _Tokens | _TowerRows,
    target: _Target,
) -> None:
    def function(module: Any, args: Any, output: Tensor) -> Tensor:
        if next(iter(module._forward_hooks.values())) is not hook:
            # Somebody else saw this tensor before and may have kept it.
            output = output.clone()
        return write(output, target, tokens)

    hook = hooks.write(module, function)


def _point_hook(
    write: _Write, tokens: _Tokens | _TowerRows, seen: PassInputs, target: _Target
) -> Any:
    def hook(x: Tensor, hook: Any) -> Tensor:
        tokens.ids, tokens.real = seen.ids, seen.real
        # What a hook point hands out may be cached by others, so it is not changed in place.
        return write(x.clone(), target, tokens)

    return hook
