"""Which model, and which of its neurons, a result belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

SITES = ("llm", "vision", "audio", "projector")


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a result came from, as far as a result must know it.

    Attributes:
        name: Hub name or path; not compared, as the same model may be loaded from several places.
        architecture: Class name of the Hugging Face model.
        layers: Number of layers that have neurons.
        neurons: Number of neurons in each layer; in the widest, where layers differ.
        site: Where the neurons live: "llm", "vision", "audio" or "projector".
        fingerprint: Digest of the weights, where it is known.
        widths: Number of neurons of each layer, where layers differ, as where some have experts and
            others have none; None where all have `neurons`. Tensors [layer neuron] have `neurons`
            columns in any case, and those beyond a layer's own stand for nothing.

    Example:
        >>> big = ModelIdentity("Qwen/Qwen2-VL-7B", "Qwen2VLForConditionalGeneration", 28, 18944)
        >>> big.check(big)
    """

    name: str = field(compare=False)
    architecture: str
    layers: int
    neurons: int
    site: str = "llm"
    fingerprint: str | None = None
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.widths is None:
            return
        widths = tuple(self.widths)  # a list, where it comes from a file
        if len(widths) != self.layers or max(widths) != self.neurons:
            raise ValueError(
                f"widths has {len(widths)} layers of at most {max(widths)} neurons; expected "
                f"{self.layers} of at most {self.neurons}."
            )
        object.__setattr__(self, "widths", widths if min(widths) < self.neurons else None)

    @property
    def total(self) -> int:
        """How many neurons there are."""
        return self.layers * self.neurons if self.widths is None else sum(self.widths)

    @property
    def exists(self) -> Bool[Tensor, "layer neuron"]:
        """Which neurons there are: all, unless layers have different numbers of them."""
        widths = torch.tensor(self.widths or [self.neurons] * self.layers)
        return torch.arange(self.neurons) < widths[:, None]

    def check(self, other: ModelIdentity, what: str = "This") -> None:
        """Refuse another model: one of another shape, site, architecture or weights.

        Weights are compared by fingerprint, and only where both are known; the name is not
        compared, as the same model may be loaded from several places. A fingerprint of another
        version of miner-lens read other weights, so it is not compared either, and a warning says
        so.

        Args:
            other: The model at hand.
            what: The result that belongs to `self`, for the error message.

        Raises:
            ValueError: If `other` is another model.
        """
        again = "Mine again on this model, or load the one it was mined on."
        shape = f"{self.layers} layers x {self.neurons} neurons"
        if (self.layers, self.neurons) != (other.layers, other.neurons):
            given = f"{other.layers} x {other.neurons}"
        elif self.widths != other.widths:
            shape = f"layers of {_listed(self)} neurons"
            given = f"layers of {_listed(other)} neurons"
        elif self.site != other.site:
            shape, given = f"site {self.site!r}", f"site {other.site!r}"
        elif self.architecture != other.architecture:
            shape, given = self.architecture, other.architecture
        elif None in (self.fingerprint, other.fingerprint):
            return
        elif _version(self.fingerprint) != _version(other.fingerprint):
            warnings.warn(
                f"{what} was mined on {self.name} and this model is {other.name}. Their "
                "fingerprints are of different versions of miner-lens, so only architecture and "
                "shape were compared, not the weights. Mine again to have these compared too.",
                stacklevel=2,
            )
            return
        elif self.fingerprint != other.fingerprint:
            shape = f"weights {self.fingerprint}"
            given = f"weights {other.fingerprint} of the same shape"
            again += " To try the same neurons here all the same, use NeuronSet.transfer(model)."
        else:
            return
        raise ValueError(
            f"{what} was mined on {shape} ({self.name}); "
            f"this model has {given} ({other.name}). {again}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelIdentity:
        """What `to_dict` gave; fields that a later version added are left out."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def _listed(model: ModelIdentity) -> str:
    """How many neurons its layers have."""
    return ", ".join(map(str, model.widths or [model.neurons] * model.layers))


def _version(fingerprint: str | None) -> str:
    """Which version made a fingerprint; the first one named none."""
    return (fingerprint or "").rpartition(":")[0]


def better_known(one: ModelIdentity | None, other: ModelIdentity | None) -> ModelIdentity | None:
    """Of two identities of one model the one that tells more: the weights, if either does."""
    if one is None or (one.fingerprint is None and other is not None):
        return other
    return one
