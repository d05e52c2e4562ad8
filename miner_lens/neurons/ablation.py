"""Switch neurons off, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from miner_lens.models import sites
from miner_lens.models.access import identity, mlps
from miner_lens.models.bridge import prepare
from miner_lens.models.checkpointing import is_checkpointed
from miner_lens.models.experts import passing
from miner_lens.models.inside import (
    bare,
    compiled,
    hf_model_of,
    is_bridge,
    is_compiled,
    uncompiled,
)
from miner_lens.models.pass_inputs import PassInputs, pass_inputs
from miner_lens.models.sites import Tower
from miner_lens.neurons.active import noted
from miner_lens.neurons.context_hooks import ContextHooks
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.neurons.writing import Target, Tokens, TowerRows, Value, Write, tokens_of

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
    also after an exception; contexts may be closed in any order and thread. What gradient
    checkpointing computes again for a later backward pass is ablated as it was. A warning says so
    where the model ran and nothing was written.

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
            meta device and not offloaded. In a pass: it does not say which tokens are real, or of
            which modality, and that matters.

    Example:
        with ml.ablate(model, msns["image"]):
            logits = model(**inputs)
    """
    with ExitStack() as stack:
        hooks = PreparedAblation(model, neurons, value, at, complement).open(stack)
        yield
        hooks.warn_if_idle(lambda: is_compiled(model), stacklevel=3)


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
    write = Write(check_neurons(model, neurons), value, at, complement)
    tokens = tokens_of(model, write)
    if isinstance(tokens, TowerRows) and write.needs_tokens:
        raise ValueError(
            "ablation_hooks cannot write 'min' in a tower: hook points do not say which rows are "
            "one image or clip. Use ml.ablate, which can."
        )
    tokens = tokens.of(pass_inputs(model))
    hf_model = hf_model_of(model)
    place = sites.find(hf_model, write.site)
    layers = mlps(model, write.site)
    write.check(layers)
    hooks: list[Hook] = []
    description = write.described()
    for layer, target in write.targets(layers, hf_model).items():
        hook = _point_hook(hf_model, write, tokens, target)
        vars(hook)["description"] = description  # by which a checkpoint tells it from others
        hooks.append((place.activation_point(layer), hook))
    return hooks


@contextmanager
def opened(model: Any, ablations: Sequence[PreparedAblation]) -> Iterator[None]:
    """Several ablations of a model, one inside the other, while the context is open."""
    with ExitStack() as stack:
        hooks = [one.open(stack) for one in ablations]
        yield
        for one in hooks:
            one.warn_if_idle(lambda: is_compiled(model), stacklevel=3)


@contextmanager
def opened_in_rows(
    model: Any, parts: Sequence[tuple[Sequence[PreparedAblation], int]]
) -> Iterator[None]:
    """Several conditions of a model as rows of one batch, while the context is open.

    Args:
        model: The model.
        parts: From the first row on, the ablations of how many rows; none: these are intact.

    Raises:
        ValueError: Neurons of a tower, where what passes is no row of the batch.

    Example:
        off = PreparedAblation(model, msns["image"])
        with opened_in_rows(model, [([], 4), ([off], 4)]):
            logits = model(**eight_rows)
    """
    placed: list[tuple[PreparedAblation, slice | None]] = []
    end = 0
    for ablations, count in parts:
        placed += [(one, slice(end, end + count)) for one in ablations]
        end += count
    if outside := [one.site for one, _ in placed if one.site != "llm"]:
        raise ValueError(
            f"Neurons of site {outside[0]!r} cannot be switched off in some rows of a batch alone: "
            "what passes there are patches or frames. Try that condition by itself."
        )
    with ExitStack() as stack:
        hooks = (
            placed[0][0].open_all(stack, placed, end)
            if placed
            else ContextHooks(hf_model_of(model))
        )
        yield
        hooks.warn_if_idle(lambda: is_compiled(model), stacklevel=3)


class PreparedAblation:
    """An ablation that fits a model, with what opening it needs, to be opened again and again.

    Args are those of `ablate`. The model must not change its modules or devices meanwhile.

    Attributes:
        site: Where its neurons are.
        description: What it does, as JSON can hold it.

    Raises:
        ValueError: As `ablate`.
    """

    def __init__(
        self,
        model: Any,
        neurons: Neurons,
        value: Value = "zero",
        at: str | None = None,
        complement: bool = False,
    ) -> None:
        self._model, self._hf_model = model, hf_model_of(model)
        self._write = Write(check_neurons(model, neurons), value, at, complement)
        self._tokens = tokens_of(model, self._write)
        self.site = self._write.site
        self.description = self._write.described()
        place = sites.find(self._hf_model, self.site)
        self._layers = place.mlps(self._hf_model)
        self._write.check(self._layers)
        self._targets = self._write.targets(self._layers, self._hf_model)
        tower = [place.module(self._hf_model)] if isinstance(place, Tower) else []
        self._runs = tower or [self._hf_model, *compiled(model)]

    def open(self, stack: ExitStack) -> ContextHooks:
        """Switch the neurons off until the stack closes."""
        return self.open_all(stack, [(self, None)])

    def open_all(
        self,
        stack: ExitStack,
        placed: Sequence[tuple[PreparedAblation, slice | None]],
        batch: int | None = None,
    ) -> ContextHooks:
        """Open ablations of the same site and model as this one, until the stack closes.

        Args:
            stack: The stack.
            placed: Each with the rows of the batch that it is for; None: all.
            batch: How many rows there are, where some are named.
        """
        hooks = ContextHooks(self._hf_model, [partial(passing, self._layers), uncompiled])
        by_layer: dict[int, list[_Part]] = {}
        stack.enter_context(hooks.open())
        for one, rows in placed:
            where = {} if rows is None else {"rows": [rows.start, rows.stop]}
            stack.enter_context(noted(self._hf_model, one.description | where))
            tokens = one._tokens.of(PassInputs(), rows)
            hooks.know(tokens.inputs)
            if one._write.needs_tokens:
                tokens.watch(self._model)
            for layer, target in one._targets.items():
                by_layer.setdefault(layer, []).append(_Part(one._write, target, tokens, rows))
        for layer, parts in by_layer.items():
            _write_into(self._layers[layer].activation, hooks, parts, batch)
        hooks.watch(self._runs)
        return hooks


@dataclass(frozen=True)
class _Part:
    """What an ablation writes in a layer, in some rows of the batch; None: in all."""

    does: Write
    target: Target
    tokens: Tokens | TowerRows
    rows: slice | None

    def write(self, x: Float[Tensor, "*row neuron"]) -> Float[Tensor, "*row neuron"]:
        """X with what is written; in place where no gradient is wanted."""
        if self.rows is None:
            return self.does(x, self.target, self.tokens)
        some = x[self.rows]
        new = self.does(some, self.target, self.tokens)
        if new is some:
            return x
        return torch.cat([x[: self.rows.start], new, x[self.rows.stop :]])


def _write_into(
    module: Any, hooks: ContextHooks, parts: Sequence[_Part], batch: int | None
) -> None:
    def function(module: Any, args: Any, output: Tensor) -> Tensor:
        if batch not in (None, len(output)):
            raise ValueError(
                f"Neurons were to be switched off in rows of a batch of {batch}, but the MLP's "
                f"activation function gives {list(output.shape)}. Try one condition at a time."
            )
        if next(iter(module._forward_hooks.values())) is not hook:
            # Somebody else saw this tensor before and may have kept it.
            output = output.clone()
        for part in parts:
            output = part.write(output)
        return output

    hook = hooks.write(module, function)


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


def _point_hook(
    hf_model: Any, write: Write, tokens: Tokens | TowerRows, target: Target
) -> Callable[..., Tensor]:
    def hook(x: Tensor, hook: Any) -> Tensor:
        running = tokens.inputs.running
        if running is not None and running.grad and hf_model.training:
            running.once("checkpointed", lambda: _refuse_checkpointed(hf_model))
        # What a hook point hands out may be cached by others, so it is not changed in place.
        return write(x.clone(), target, tokens)

    return hook


def _refuse_checkpointed(hf_model: Any) -> None:
    if is_checkpointed(hf_model):
        raise ValueError(
            "Gradient checkpointing computes layers again for the backward pass, when these hooks "
            "may be gone. Use ml.ablate, which is there again, or switch checkpointing off."
        )
