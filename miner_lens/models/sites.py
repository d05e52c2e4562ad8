"""Sites: where in a model neurons live, and what passes through there.

`llm` is the decoder, which every model has. The towers that turn other media into the decoder's
embeddings (`vision`, `audio`, `projector`) differ from family to family, so the package with a
family's adapter describes them, by subclasses of `Tower`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from miner_lens.models.identity import SITES

ENTRY_POINTS = "miner_lens.sites"
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")

# What Hugging Face calls a medium among a model's inputs.
MEDIA_INPUTS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "audio": "input_features",
}

Rotary = tuple[Float[Tensor, "row d_head"], Float[Tensor, "row d_head"]]


@dataclass(frozen=True)
class MLP:
    """One layer's MLP: where its neurons are read and written.

    Attributes:
        activation: The activation function's module; its output is X, [... neuron].
        before: The linear layer whose output the activation function takes (in a gated MLP the
            gate projection).
        down: The linear layer that takes the neurons back, `neuron -> d_model`.
    """

    activation: nn.Module
    before: Any
    down: Any


@dataclass(frozen=True)
class Rows:
    """What the rows of a tower's activations are, X being flattened to [row neuron].

    Attributes:
        real: False at padding.
        items: Which image, video or clip of the call each row belongs to, rising from 0.
        segments: Which rows attend to one another, rising: an image, a frame of a video, a clip.
    """

    real: Bool[Tensor, " row"]
    items: Int[Tensor, " row"]
    segments: Int[Tensor, " row"]


@dataclass(frozen=True)
class Call:
    """One call of a tower within a forward pass.

    Attributes:
        modality: What all of its items are.
        rows: What its rows are, on the CPU.
        samples: Which sample each item belongs to, rising.
    """

    modality: str
    rows: Rows
    samples: tuple[int, ...]

    def spans(self) -> list[tuple[int, int, int]]:
        """(sample, first row, row after the last) of each sample that has items in this call."""
        rows = torch.tensor(self.samples)[self.rows.items]
        samples, counts = torch.unique_consecutive(rows, return_counts=True)
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
        modalities: The media that pass through it.
    """

    modalities: tuple[str, ...]

    @abstractmethod
    def attention_points(self, layer: int) -> tuple[str, ...]:
        """Hook points that queries and keys are made of; none where a layer has no attention."""

    def rotary(
        self, hf_model: Any, inputs: Mapping[str, Any], modality: str, device: torch.device
    ) -> Rotary | None:
        """Cosines and sines of a call's rotary position embedding; None if the tower has none.

        Asked for once a call and not in every layer, so it may wait for the device.
        """
        return None

    @abstractmethod
    def queries_and_keys(
        self, hf_model: Any, seen: tuple[Tensor, ...], rotary: Rotary | None
    ) -> tuple[Float[Tensor, "row head d_head"], Float[Tensor, "row head d_head"]]:
        """Queries and keys as attention uses them, from what the `attention_points` gave.

        Queries are not yet divided by the square root of d_head. This is called in every layer,
        and should not wait for the device.
        """

    @abstractmethod
    def module(self, hf_model: Any) -> nn.Module:
        """The Hugging Face module that is called once for all items of a modality."""

    @abstractmethod
    def rows(self, hf_model: Any, arguments: Mapping[str, Any]) -> Rows:
        """What the rows are in one call of `module`, from the arguments of that call."""

    @abstractmethod
    def items(
        self, hf_model: Any, inputs: Mapping[str, Any], modality: str
    ) -> tuple[Rows, Sequence[int]]:
        """What the rows are in a modality's call, and how many tokens each of its items becomes.

        Asked for once a call, from the model inputs, so it may wait for the device.
        """

    def calls(self, hf_model: Any, inputs: Mapping[str, Any]) -> list[Call]:
        """The calls that a forward pass with these model inputs makes: one for each modality."""
        calls = []
        for modality in self.modalities:
            if inputs.get(MEDIA_INPUTS[modality]) is None:
                continue
            rows, tokens = self.items(hf_model, inputs, modality)
            placeholder = getattr(hf_model.config, f"{modality}_token_id")
            placeholders = (inputs["input_ids"] == placeholder).sum(-1)
            calls.append(Call(modality, rows, owners(placeholders.tolist(), tokens)))
        return calls


class Decoder(Site):
    """The language model's gated MLPs."""

    name = "llm"

    def mlps(self, hf_model: Any) -> list[MLP]:
        """The decoder's gated MLPs.

        Raises:
            ValueError: A layer has no gated MLP, or its weights were folded by compatibility mode,
                which computes the MLP without its activation module.
        """
        if not hasattr(hf_model, "get_decoder"):
            raise ValueError(
                "Expected a TransformerBridge or a Hugging Face model, got "
                f"{type(hf_model).__name__}."
            )
        decoder = hf_model.get_decoder()
        # GPT-2 and its kin call their layers h; they have no gated MLPs, and the error says so.
        layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None) or [decoder]
        return [_gated(hf_model, index, layer) for index, layer in enumerate(layers)]

    def activation_point(self, layer: int) -> str:
        """TransformerLens hook point of a layer's X."""
        return f"blocks.{layer}.mlp.act.hook_out"

    def rotated_points(self, layer: int) -> tuple[str, str]:
        """Hook points of queries and keys after RoPE."""
        return f"blocks.{layer}.attn.hook_rot_q", f"blocks.{layer}.attn.hook_rot_k"


def _gated(hf_model: Any, index: int, layer: Any) -> MLP:
    mlp: Any = getattr(layer, "mlp", None)
    activation = next((getattr(mlp, n) for n in ACTIVATION_NAMES if hasattr(mlp, n)), None)
    if not (hasattr(mlp, "gate_proj") and hasattr(mlp, "down_proj")) or activation is None:
        raise ValueError(
            f"Layer {index} of {type(hf_model).__name__} has no gated MLP (gate_proj, up_proj, "
            f"down_proj and an activation), but {type(mlp).__name__}. Neurons are defined as "
            "the output of a gated MLP's activation function; this model has none to mine."
        )
    if getattr(mlp, "_use_processed_weights", False):
        raise ValueError(
            "This bridge is in compatibility mode with processed weights, which computes the "
            "MLP without its activation module, so neurons can be neither read nor switched "
            "off. Use the bridge without enable_compatibility_mode(), or with "
            "enable_compatibility_mode(no_processing=True)."
        )
    return MLP(plain(activation), mlp.gate_proj, mlp.down_proj)


def plain(module: Any) -> Any:
    """The Hugging Face module inside a TransformerLens component, or the module itself."""
    return getattr(module, "original_component", None) or module


def sites(hf_model: Any) -> dict[str, Site]:
    """The sites of a Hugging Face model by name: `llm`, and its family's towers."""
    return {"llm": Decoder()} | _towers(type(hf_model).__name__)


@cache
def _towers(architecture: str) -> dict[str, Site]:
    """A family's towers; looked up once, as going through all installed packages takes long."""
    found: dict[str, Site] = {}
    for entry in entry_points(group=ENTRY_POINTS, name=architecture):
        towers: Sequence[Site] = entry.load()()
        found |= {tower.name: tower for tower in towers}
    return found


def find(hf_model: Any, name: str) -> Site:
    """A site of a Hugging Face model by its name.

    Raises:
        ValueError: The model has no such site, or none that is known.
    """
    if name == "llm":
        return Decoder()
    known = sites(hf_model)
    if name not in known:
        kind = "one of its sites" if name in SITES else f"a site ({', '.join(SITES)})"
        raise ValueError(
            f"{name!r} is not {kind}: neurons of {type(hf_model).__name__} are known in "
            f"{', '.join(known)}. A tower has neurons where an activation function stands between "
            f"two linear layers; the entry-point group {ENTRY_POINTS!r} says where."
        )
    return known[name]


def owners(placeholders: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Which sample each item belongs to: samples take as many items as fill their placeholders.

    Args:
        placeholders: Number of placeholder tokens in each sample.
        sizes: Number of tokens that each item fills, in order.

    Raises:
        ValueError: The items do not fill the placeholders.

    Example:
        >>> owners([4, 0, 3], [2, 2, 3])
        (0, 0, 2)
    """
    result: list[int] = []
    left, fitting = list(sizes), True
    for sample, wanted in enumerate(placeholders):
        while wanted > 0 and left:
            wanted -= left.pop(0)
            result.append(sample)
        fitting = fitting and wanted == 0
    if left or not fitting:
        raise ValueError(
            f"The prompts have {sum(placeholders)} placeholder tokens "
            f"({', '.join(map(str, placeholders))}), and the media fill {sum(sizes)} "
            f"({', '.join(map(str, sizes))})."
        )
    return tuple(result)
