"""Sites: where in a model neurons live, and what passes through there.

`llm` is the decoder, which every model has. The parts that turn other media into the decoder's
embeddings (`vision`, `audio`, `projector`) are found in the model itself; see
`miner_lens.models.structure`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from miner_lens.models.experts import expert_mlp, experts_of
from miner_lens.models.identity import SITES
from miner_lens.models.items import (
    MEDIA_INPUTS,
    Rows,
    items_of,
    masks_beside,
    owners,
    owners_of_rows,
    require_read,
    rows_of_call,
    rows_of_tokens,
)
from miner_lens.models.modality import media_tokens
from miner_lens.models.structure import (
    ACTIVATION_NAMES,
    ENTRY_POINTS,
    MLP,
    Stack,
    decoder_of,
    joined,
    part,
    plain,
    stacks,
)

HOOKS = ("hook_rot_q", "hook_rot_k")
# Of a fused gate and up projection the activation function takes a half.
GATES = ("gate_proj", "gate_up_proj")


@dataclass(frozen=True)
class Call:
    """One call of a tower within a forward pass.

    Attributes:
        rows: What the rows of its heap are, on the CPU.
        samples: Which sample each item belongs to, rising.
    """

    rows: Rows
    samples: tuple[int, ...]

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(sample, first row, row after the last) of each sample that has items in this call."""
        owner = torch.tensor(self.samples)[self.rows.items]
        samples, counts = torch.unique_consecutive(owner, return_counts=True)
        stops = counts.cumsum(0)
        starts = stops - counts
        return list(zip(samples.tolist(), starts.tolist(), stops.tolist(), strict=True))


class Site(ABC):
    """Neurons of one part of a model."""

    name: str

    @abstractmethod
    def mlps(self, hf_model: Any) -> list[MLP]:
        """The part's MLPs, one per layer."""

    @abstractmethod
    def activation_point(self, layer: int) -> str:
        """TransformerLens hook point of a layer's X."""


class Tower(Site):
    """A part of the model in which one medium's neurons live, before it reaches the decoder.

    Attributes:
        name: `"vision"`, `"audio"` or `"projector"`.
        modalities: The media that pass through it.
    """

    def __init__(self, stack: Stack, hf_model: Any) -> None:
        self.name, self.modalities = stack.site, stack.modalities
        self._stack = stack
        self._activations = [_component(hf_model, layer.activation) for layer in stack.layers]
        # A projector queries the media of the tower before it, which is not one segment.
        attentions = [layer.attention for layer in stack.layers if self.name != "projector"]
        self._attentions = [path and _component(hf_model, path) for path in attentions]

    def mlps(self, hf_model: Any) -> list[MLP]:
        """One per layer."""
        layers = self._stack.layers
        names = [(layer.activation, layer.before, layer.down) for layer in layers]
        # Not `part` of the linear layers, which may have adapters around them.
        return [MLP(part(hf_model, a), *(_held(hf_model, n) for n in bd)) for a, *bd in names]

    def activation_point(self, layer: int) -> str:
        """TransformerLens hook point of a layer's X, [item row neuron] or [row neuron].

        Raises:
            ValueError: The model is not in a bridge, so that it has no hook points.
        """
        component = self._activations[layer]
        if component is None:
            raise ValueError(f"The {self.name} tower has no hook points: use ml.wrap(model).")
        return str(component.hook_out.name)

    def attention_points(self, layer: int) -> tuple[str, ...]:
        """Hook points of queries and keys after RoPE; none where a layer has no attention."""
        component = self._attentions[layer] if self._attentions else None
        names = () if component is None else HOOKS
        return tuple(str(getattr(component, name).name) for name in names)

    def attentions(self) -> list[Any]:
        """Each layer's attention component; None where there is none, or no bridge."""
        return list(self._attentions)

    def module(self, hf_model: Any) -> nn.Module:
        """What is called once for all items of a medium: the tower, also for what comes after it.

        Within a bridge it is the component around it.
        """
        towers = [
            stack.module
            for stack in stacks(hf_model)
            if stack.site != "projector" and set(stack.modalities) & set(self.modalities)
        ]
        name = towers[0] if towers else self._stack.module
        module: nn.Module = _component(hf_model, name) or part(hf_model, name)
        return module

    def told(self, hf_model: Any) -> list[nn.Module]:
        """The modules whose arguments say what its rows are: `module`, and one within or after."""
        layer, blocks = self._stack.layers[0].activation, self._stack.blocks
        inner = self._stack.module
        if blocks is not None:
            inner = joined(blocks, layer.removeprefix(f"{blocks}.").partition(".")[0])
        modules = [self.module(hf_model), _held(hf_model, inner)]
        return list(dict.fromkeys(modules))

    def rows(self, hf_model: Any, calls: Sequence[Mapping[str, Any]], shape: Sequence[int]) -> Rows:
        """What the rows of X, of that shape, are in one call of the tower.

        Args:
            hf_model: The Hugging Face model.
            calls: The arguments by name that the modules of `told` were given, `module` first.
            shape: Of X.
        """
        return rows_of_call(self.module(hf_model), calls, shape)

    def media(self, inputs: Mapping[str, Any]) -> list[str]:
        """The modalities among a model's inputs, for each of which the tower is called once."""
        return [m for m in self.modalities if inputs.get(MEDIA_INPUTS[m]) is not None]

    def call(
        self,
        hf_model: Any,
        inputs: Mapping[str, Any],
        modality: str,
        calls: Sequence[Mapping[str, Any]],
        shape: Sequence[int],
    ) -> Call:
        """Whose the rows are in the call for a modality, while it runs.

        Args:
            hf_model: The Hugging Face model.
            inputs: The model's inputs.
            modality: One of `media`.
            calls: As for `rows`.
            shape: Of X.

        Raises:
            ValueError: The media do not fill the placeholders, or which rows are padding is not
                known.
        """
        token = media_tokens(hf_model.config)[modality]
        placeholders = (inputs["input_ids"] == token).sum(-1).tolist()
        encoder, given = hf_model.get_encoder(modality=modality), inputs[MEDIA_INPUTS[modality]]
        items = items_of(hf_model, encoder, inputs, modality)
        count = int(torch.Size(shape[:-1]).numel())
        if items is not None:
            rows = items.rows(shape)
            if items.tokens is not None:
                return Call(rows, owners(placeholders, items.tokens))
        elif len(shape) == 2 and count == sum(placeholders):  # each becomes a token, in order
            return Call(*rows_of_tokens(placeholders))
        else:
            rows = self.rows(hf_model, calls, shape)
            # What becomes a token is no padding, whatever it is made of.
            if self.name != "projector" or count != sum(placeholders):
                require_read(rows, masks_beside(inputs, given))
        return Call(*owners_of_rows(placeholders, rows, len(given)))


def _component(hf_model: Any, path: str) -> Any:
    """The TransformerLens component at a place of the model, or None."""
    holder, _, name = path.rpartition(".")
    found = part(hf_model, holder)._modules[name]
    return found if getattr(found, "original_component", None) is not None else None


def _held(hf_model: Any, path: str) -> Any:
    """What stands at a place of the model: the module, or the component around it."""
    holder, _, name = path.rpartition(".")
    return part(hf_model, holder)._modules[name]


class Decoder(Site):
    """The language model's gated MLPs, or its experts; see `miner_lens.models.experts`."""

    name = "llm"

    def mlps(self, hf_model: Any) -> list[MLP]:
        """The decoder's gated MLPs; the experts of a layer are one.

        Raises:
            ValueError: A layer has no gated MLP, or weights were folded by compatibility mode,
                which computes the MLP without its activation module.
        """
        decoder = decoder_of(hf_model)
        # GPT-2 and its kin call their layers h; they have no gated MLPs, and the error says so.
        layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None) or [decoder]
        return [_gated(hf_model, index, layer) for index, layer in enumerate(layers)]

    def activation_point(self, layer: int) -> str:
        """TransformerLens hook point of a layer's X."""
        return f"blocks.{layer}.mlp.act.hook_out"


def _gated(hf_model: Any, index: int, layer: Any) -> MLP:
    mlp: Any = getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)
    if experts_of(mlp) is not None:
        return expert_mlp(mlp)
    activation = next((getattr(mlp, n) for n in ACTIVATION_NAMES if hasattr(mlp, n)), None)
    gate = next((getattr(mlp, name) for name in GATES if hasattr(mlp, name)), None)
    if gate is None or not hasattr(mlp, "down_proj") or activation is None:
        what = type(plain(mlp)).__name__
        if hasattr(mlp, "experts"):
            what = (
                "experts that transformers' experts interface does not compute with a gate that "
                "multiplies"
            )
        raise ValueError(
            f"Layer {index} of {type(hf_model).__name__} has no gated MLP (gate_proj, up_proj, "
            f"down_proj and an activation), but {what}. Neurons are defined as "
            "the output of a gated MLP's activation function; this model has none to mine."
        )
    if not isinstance(activation, nn.Module):
        raise ValueError(
            f"Layer {index} of {type(hf_model).__name__} calls its activation function as "
            f"{type(activation).__name__} and not as a module, so that nothing can be hooked there "
            "and neurons can be neither read nor switched off."
        )
    if getattr(mlp, "_use_processed_weights", False):
        raise ValueError(
            "This bridge is in compatibility mode with processed weights, and computes this MLP "
            "without its activation module, so neurons can be neither read nor switched off. Use "
            "the bridge without enable_compatibility_mode(), or with no_processing=True; or bake "
            "an ablation (ml.bake), load that checkpoint, and enable the mode there."
        )
    return MLP(plain(activation), gate, mlp.down_proj)


def sites(hf_model: Any) -> dict[str, Site]:
    """The sites of a Hugging Face model by name: `llm`, and its towers."""
    places: dict[str, Site] = {"llm": Decoder()}
    return places | {stack.site: Tower(stack, hf_model) for stack in stacks(hf_model)}


def find(hf_model: Any, name: str) -> Site:
    """A site of a Hugging Face model by its name.

    Raises:
        ValueError: The model has no such site, or none that is known.
    """
    if name == "llm":
        return Decoder()
    for stack in stacks(hf_model):
        if stack.site == name:
            return Tower(stack, hf_model)
    kind = "one of its sites" if name in SITES else f"a site ({', '.join(SITES)})"
    raise ValueError(
        f"{name!r} is not {kind}: neurons of {type(hf_model).__name__} are known in "
        f"{', '.join(sites(hf_model))}. A tower has neurons where an activation function stands "
        f"between two linear layers; the entry-point group {ENTRY_POINTS!r} says where."
    )
