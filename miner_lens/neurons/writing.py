"""What an ablation writes, where, and at which tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from miner_lens.data.signature import described
from miner_lens.models import sites
from miner_lens.models.access import layout
from miner_lens.models.devices import offloaded_weights
from miner_lens.models.experts import ExpertProjection
from miner_lens.models.forward_pass import ForwardPass
from miner_lens.models.inside import hf_model_of
from miner_lens.models.modality import Masks
from miner_lens.models.pass_inputs import PassInputs
from miner_lens.models.sites import Tower
from miner_lens.models.structure import MLP, way_to_decoder
from miner_lens.neurons.neuron_set import NeuronSet


@dataclass(frozen=True)
class Times:
    """What `scale` has written: X times a number.

    Attributes:
        by: The number.
    """

    by: float


Value = float | Literal["zero", "min", "mean"] | Times


class Tokens:
    """Knows of the pass that is running which tokens are real, and which are to be ablated.

    Attributes:
        inputs: What is known of the pass.
        rows: Of which rows of the batch.
    """

    def __init__(self, model: Any, at: str | None) -> None:
        self.inputs = PassInputs()
        self.rows = slice(None)
        self._way = way_to_decoder(hf_model_of(model))
        self.at = at
        self.layout = None if at is None else layout(model)
        if self.layout is not None:
            known = self.layout.masks(torch.zeros(1, 1, dtype=torch.long))
            if at not in known:
                raise ValueError(f"The model has no modality {at!r}; it has {', '.join(known)}.")

    def of(self, inputs: PassInputs, rows: slice | None = None) -> Tokens:
        """The same of other passes, or of some rows of the batch."""
        tokens = copy.copy(self)
        tokens.inputs, tokens.rows = inputs, rows or slice(None)
        return tokens

    def watch(self, model: Any) -> None:
        """See each pass of a model from now on."""
        self.inputs.watch(model, self._way)

    def chosen(self) -> Bool[Tensor, "batch pos"] | None:
        """The tokens of the modality to ablate at, or None where it is everywhere."""
        running = self.inputs.running
        if running is None or running.ids is None or self.at is None:
            return None
        mask: Tensor = running.once(self, lambda: self._chosen(running))
        return mask

    def _chosen(self, running: ForwardPass) -> Tensor:
        known: Any = self.layout
        try:
            real = running.real
        except ValueError:
            if self.at not in known.media:
                raise
            real = None  # padding is no medium
        masks: Masks = known.masks(running.ids, real)
        return masks[str(self.at)][self.rows]

    def lowest(self, x: Float[Tensor, "batch pos neuron"]) -> Float[Tensor, "batch 1 1"]:
        """The smallest X of each sample's real tokens."""
        running = self.inputs.running
        if running is None or (len(x), running.shape[1]) != x.shape[:-1]:
            raise ValueError(
                "value='min' needs to see the model called as a whole, to know which tokens are "
                f"one sample's and real, and the MLP's activation function gives {list(x.shape)}. "
                "Call the model, or give another value."
            )
        if running.real is None:
            if running.packed:
                raise ValueError(
                    "value='min' is the smallest X of each sample, and the position_ids of this "
                    "pass say that a row has several. Give each sample a row of its own."
                )
            return x.amin(dim=(-2, -1), keepdim=True)
        real = running.real[self.rows].to(x.device)[..., None]
        lowest = x.masked_fill(~real, torch.inf).amin(dim=(-2, -1), keepdim=True)
        # Anything finite where all is padding, as in a chunk of a prompt.
        return lowest.masked_fill(~real.any(1, keepdim=True), 0)


class TowerRows:
    """Knows of the tower's call that is running which rows are real, and of which item each is.

    Attributes:
        inputs: What is known of the call.
    """

    def __init__(self, tower: Tower) -> None:
        self.inputs = PassInputs()
        self.tower = tower
        self._hf_model: Any = None

    def of(self, inputs: PassInputs, rows: slice | None = None) -> TowerRows:
        """The same of other calls."""
        tokens = copy.copy(self)
        tokens.inputs = inputs
        return tokens

    def watch(self, model: Any) -> None:
        """See each call of the tower from now on."""
        self._hf_model = hf_model_of(model)
        # Until the next call, as what comes after the tower has its rows too.
        for module in self.tower.told(self._hf_model):
            self.inputs.watch_calls(module)

    def chosen(self) -> None:
        """In a tower every row is ablated."""

    def lowest(self, x: Float[Tensor, "*row neuron"]) -> Float[Tensor, "*row 1"]:
        """The smallest X of the image, video or clip that each row belongs to."""
        running = self.inputs.running
        if running is None:
            raise ValueError(
                f"value='min' needs to see the {self.tower.name} tower called as a whole, to know "
                "which rows are one image, video or clip. Call the model or the whole tower, or "
                "give another value."
            )
        # Once a call, not in every layer.
        items, real, count = running.once((self, x.shape[:-1]), lambda: self._rows(running, x))
        items, real = items.to(x.device), real.to(x.device)
        by_row = x.flatten(0, -2).amin(-1).masked_fill(~real, torch.inf)
        by_item = by_row.new_full((count,), torch.inf)
        by_item.scatter_reduce_(0, items, by_row, "amin")
        by_item = by_item.masked_fill(by_item == torch.inf, 0)  # an item of padding alone
        return by_item[items].view(*x.shape[:-1], 1)

    def _rows(self, running: ForwardPass, x: Tensor) -> tuple[Tensor, Tensor, int]:
        calls = [call.arguments for call in running.calls]
        rows = self.tower.rows(self._hf_model, calls, x.shape)
        return rows.items.to(x.device), rows.real.to(x.device), int(rows.items[-1]) + 1


def tokens_of(model: Any, write: Write) -> Tokens | TowerRows:
    """What is to be known of each pass's tokens, or of each call's rows of a tower.

    Raises:
        ValueError: The model has no such modality, or a tower's neurons see no such tokens.
    """
    place = sites.find(hf_model_of(model), write.site)
    if not isinstance(place, Tower):
        return Tokens(model, write.at)
    if write.at is not None and (write.at,) != place.modalities:
        raise ValueError(
            f"at={write.at!r} chooses among the prompt's tokens, but neurons of site "
            f"{place.name!r} see only {' and '.join(place.modalities)}. Leave at out."
        )
    write.at = None
    return TowerRows(place)


@dataclass(frozen=True)
class Target:
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


class Write:
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

    def targets(self, layers: list[MLP], hf_model: Any) -> dict[int, Target]:
        """Neurons by layer, on the device where the layer computes."""
        targets = {}
        offloaded = cache(offloaded_weights)  # asked only where a weight is on no device
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
            elif weight is not None and id(weight) not in offloaded(hf_model):
                raise ValueError(
                    f"The weights of layer {layer} are on the meta device, where nothing is "
                    "computed, so there is nothing to ablate. Load the model with its weights."
                )
            if means is not None:
                means = means.to(device)
            targets[layer] = Target(index.to(device), others, means)
        return targets

    def __call__(
        self,
        x: Float[Tensor, "*row neuron"],
        target: Target,
        tokens: Tokens | TowerRows,
    ) -> Float[Tensor, "*row neuron"]:
        """X with this written into it: in place, unless gradients are wanted."""
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
        self, x: Float[Tensor, "*row neuron"], target: Target, tokens: Tokens | TowerRows
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
