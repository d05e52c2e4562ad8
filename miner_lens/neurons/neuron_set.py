"""NeuronSet: a set of MLP neurons of one model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from miner_lens.models.access import identity as identity_of
from miner_lens.models.identity import SITES, ModelIdentity, better_known
from miner_lens.models.result import Result
from miner_lens.neurons.draw import random, random_in_layers
from miner_lens.neurons.pairs import as_pairs

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, init=False, eq=False, repr=False)
class NeuronSet(Result):
    """An immutable set of `(layer, neuron)` pairs that knows the model they belong to.

    It behaves as a set of pairs of ints, sorted: `| & - ^ ~ <= len in == hash`. Two sets are
    equal if they hold the same neurons of the same model. Sets of different models do not mix.
    A combination of two sets has the means of both; where they differ, NaN.

    Args:
        pairs: The neurons, as `(layer, neuron)` pairs, an integer array `[n, 2]` or a DataFrame of
            the columns layer and neuron.
        layers: Number of layers in the model.
        neurons: Number of neurons in each layer; in the widest, where layers differ.
        identity: The model they come from, where it is known.
        means: Mean activation of every neuron of the model, as mined; `ablate(value="mean")`
            writes these, and refuses NaN. Not part of equality.
        site: Where the neurons live: "llm", "vision", "audio" or "projector"; default the
            identity's site, or "llm".

    Raises:
        ValueError: If a pair lies outside the model, or `identity` has another shape or site.

    Example:
        >>> image = NeuronSet([(0, 3), (1, 2)], layers=2, neurons=4)
        >>> text = NeuronSet([(1, 2)], layers=2, neurons=4)
        >>> list(image - text), (0, 3) in image, len(~image)
        ([(0, 3)], True, 6)
        >>> image
        NeuronSet(2 of 8 neurons, 2 layers)
    """

    filename: ClassVar[str] = "neurons.safetensors"

    layers: int
    neurons: int
    identity: ModelIdentity | None
    site: str
    _member: Bool[Tensor, "layer neuron"]
    _means: Float[Tensor, "layer neuron"] | None

    def __init__(
        self,
        pairs: Iterable[tuple[int, int]] | Any,
        *,
        layers: int,
        neurons: int,
        identity: ModelIdentity | None = None,
        means: Float[Tensor, "layer neuron"] | None = None,
        site: str | None = None,
    ) -> None:
        if site is None:
            site = "llm" if identity is None else identity.site
        if site not in SITES:
            raise ValueError(f"There is no site {site!r}; there are {', '.join(SITES)}.")
        if identity is not None and identity.site != site:
            raise ValueError(
                f"NeuronSet was given site {site!r}, but its identity is of site "
                f"{identity.site!r}. Pass the identity of the site that was mined."
            )
        if identity is not None and (identity.layers, identity.neurons) != (layers, neurons):
            raise ValueError(
                f"NeuronSet was given {layers} layers x {neurons} neurons, but its identity "
                f"{identity.name} has {identity.layers} x {identity.neurons}. Pass the model's own."
            )
        if means is not None and means.shape != (layers, neurons):
            raise ValueError(
                f"means has shape {list(means.shape)}; expected one mean for each of "
                f"{layers} layers x {neurons} neurons."
            )
        index = as_pairs(pairs)
        _require_inside(index, layers, neurons, identity)
        member = torch.zeros(layers, neurons, dtype=torch.bool)
        member[index[:, 0], index[:, 1]] = True
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "neurons", neurons)
        object.__setattr__(self, "identity", identity)
        object.__setattr__(self, "site", site)
        object.__setattr__(self, "_member", member)
        object.__setattr__(
            self, "_means", None if means is None else means.detach().cpu().float().clone()
        )

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]] | Any, model: Any, site: str = "llm") -> NeuronSet:
        """A set of neurons of a model, such as those that a paper or a tool of your own names.

        Args:
            pairs: The neurons, as the constructor takes them.
            model: A `TransformerBridge` or a plain Hugging Face model.
            site: Where the neurons live.

        Raises:
            ValueError: A pair lies outside the model, or the model has no such site.

        Example:
            neurons = ml.NeuronSet.of([(0, 12), (3, 7)], model)
            with ml.ablate(model, neurons):
                answer = ml.generate(model, messages)
        """
        found = identity_of(model, site)
        return cls(pairs, layers=found.layers, neurons=found.neurons, identity=found)

    @classmethod
    def from_mask(
        cls,
        mask: Bool[Tensor, "layer neuron"] | Any,
        identity: ModelIdentity | None = None,
        means: Float[Tensor, "layer neuron"] | None = None,
        site: str | None = None,
    ) -> NeuronSet:
        """The neurons at which `mask` is True.

        Raises:
            ValueError: It is no boolean mask of two axes, or as the constructor.
        """
        mask = torch.as_tensor(mask).detach().cpu()
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(
                f"A mask must be booleans [layer neuron], not {mask.dtype} of shape "
                f"{list(mask.shape)}. Of scores, say which: from_mask(scores > threshold)."
            )
        layers, neurons = mask.shape
        return cls(
            mask.nonzero(),
            layers=layers,
            neurons=neurons,
            identity=identity,
            means=means,
            site=site,
        )

    @classmethod
    def union(cls, sets: Iterable[NeuronSet] | Mapping[str, NeuronSet]) -> NeuronSet:
        """Every neuron of any of the sets, or of what `select` returns.

        Raises:
            ValueError: If there are no sets, or they are of different models.
            TypeError: If they are no sets.

        Example:
            >>> parts = [NeuronSet([(0, n)], layers=1, neurons=4) for n in range(3)]
            >>> len(NeuronSet.union(parts))
            3
        """
        together: NeuronSet | None = None
        for part in sets.values() if isinstance(sets, Mapping) else sets:
            if not isinstance(part, NeuronSet):
                raise TypeError(
                    "NeuronSet.union needs a list of NeuronSets, or a mapping of names to them; "
                    f"it has {type(part).__name__}."
                )
            together = part if together is None else together | part
        if together is None:
            raise ValueError("NeuronSet.union needs at least one set.")
        return together

    @classmethod
    def random(cls, count: int, like: NeuronSet, seed: int = 0) -> NeuronSet:
        """So many neurons of the same model, drawn without replacement; for comparison.

        Raises:
            ValueError: If the model has fewer neurons.

        Example:
            >>> chosen = NeuronSet([(0, 1)], layers=2, neurons=8)
            >>> len(NeuronSet.random(5, like=chosen, seed=1))
            5
        """
        if not 0 <= count <= like.total:
            raise ValueError(f"Cannot draw {count} of the model's {like.total} neurons.")
        mask = random(like.exists, count, seed)
        return cls.from_mask(mask, like.identity, like.means, like.site)

    @classmethod
    def random_like(cls, like: NeuronSet, seed: int = 0) -> NeuronSet:
        """A layer-matched control: in each layer as many random neurons as `like` has there.

        They are drawn without replacement from all neurons of the layer, as `random` draws from all
        of the model, so that some may be neurons of `like`.

        Example:
            >>> chosen = NeuronSet([(0, 1), (2, 3), (2, 4)], layers=3, neurons=8)
            >>> NeuronSet.random_like(chosen, seed=1).counts()
            [1, 0, 2]
        """
        mask = random_in_layers(like.counts(), like.exists, seed)
        return cls.from_mask(mask, like.identity, like.means, like.site)

    @property
    def mask(self) -> Bool[Tensor, "layer neuron"]:
        """A new tensor, True at the set's neurons."""
        return self._member.clone()

    @property
    def exists(self) -> Bool[Tensor, "layer neuron"]:
        """A new tensor, True at the model's neurons: all, unless layers have different numbers."""
        if self.identity is None:
            return torch.ones_like(self._member)
        return self.identity.exists

    @property
    def total(self) -> int:
        """How many neurons the model has."""
        return self.layers * self.neurons if self.identity is None else self.identity.total

    @property
    def means(self) -> Float[Tensor, "layer neuron"] | None:
        """A new tensor of every neuron's mean activation as mined, or None if unknown."""
        return None if self._means is None else self._means.clone()

    def __len__(self) -> int:
        return int(self._member.sum())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((layer, neuron) for layer, neuron in self._member.nonzero().tolist())

    def __contains__(self, pair: object) -> bool:
        try:
            layer, neuron = map(operator.index, pair)  # type: ignore[call-overload]
        except (TypeError, ValueError):
            return False
        inside = 0 <= layer < self.layers and 0 <= neuron < self.neurons
        return inside and bool(self._member[layer, neuron])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        known = (self.identity, self.site) == (other.identity, other.site)
        return known and torch.equal(self._member, other._member)

    def __hash__(self) -> int:
        return hash((self.identity, self.site, self._member.shape, self._member.numpy().tobytes()))

    def __repr__(self) -> str:
        model = "" if self.identity is None else f", model={self.identity.name!r}"
        site = "" if self.site == "llm" else f", site={self.site!r}"
        return f"NeuronSet({len(self)} of {self.total} neurons, {self.layers} layers{model}{site})"

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._with(other, self._member | self._other(other))

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._with(other, self._member & self._other(other))

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._with(other, self._member & ~self._other(other))

    def __xor__(self, other: NeuronSet) -> NeuronSet:
        return self._with(other, self._member ^ self._other(other))

    def __invert__(self) -> NeuronSet:
        return self._with(self, ~self._member & self.exists)

    def __le__(self, other: NeuronSet) -> bool:
        return not (self._member & ~self._other(other)).any()

    def __ge__(self, other: NeuronSet) -> bool:
        return not (self._other(other) & ~self._member).any()

    def isdisjoint(self, other: NeuronSet) -> bool:
        """Whether the two sets share no neuron."""
        return not (self._member & self._other(other)).any()

    def by_layer(self) -> dict[int, Int64[Tensor, " neuron"]]:
        """Indices of the neurons in each layer that has any, sorted.

        Example:
            >>> NeuronSet([(1, 2), (1, 0)], layers=2, neurons=4).by_layer()
            {1: tensor([0, 2])}
        """
        chosen = ((layer, row.nonzero()[:, 0]) for layer, row in enumerate(self._member))
        return {layer: index for layer, index in chosen if len(index)}

    def counts(self) -> list[int]:
        """How many neurons of each layer the set holds."""
        counts: list[int] = self._member.sum(1).tolist()
        return counts

    def transfer(self, model: ModelIdentity | Any) -> NeuronSet:
        """The same neurons of another model of the same shape, without the mined means.

        Args:
            model: The other model, or its identity.

        Raises:
            ValueError: If the other model has another shape or no such site, or the identity is of
                another site.
        """
        identity = model if isinstance(model, ModelIdentity) else identity_of(model, self.site)
        return NeuronSet.from_mask(self._member, identity, site=self.site)

    def to_frame(self) -> pd.DataFrame:
        """A table of the columns site, layer and neuron, one row a neuron."""
        import pandas as pd

        table = pd.DataFrame(self._member.nonzero().numpy(), columns=["layer", "neuron"])
        table.insert(0, "site", self.site)
        return table

    def overview(self) -> pd.DataFrame:
        """How many neurons of each layer it has, and their share of the layer.

        Example:
            >>> NeuronSet([(1, 2), (1, 0)], layers=2, neurons=4).overview()["share"].tolist()
            [0.0, 0.5]
        """
        import pandas as pd

        counts = self.counts()
        widths = self.exists.sum(1).tolist()
        shares = [count / width for count, width in zip(counts, widths, strict=True)]
        return pd.DataFrame({"neurons": counts, "share": shares}).rename_axis("layer")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the set holds."""
        metadata = {"layers": self.layers, "neurons": self.neurons, "site": self.site}
        return {"pairs": self._member.nonzero(), "means": self._means}, metadata

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> NeuronSet:
        """The set that a file holds."""
        return cls(
            tensors["pairs"],
            layers=metadata["layers"],
            neurons=metadata["neurons"],
            identity=identity,
            means=tensors.get("means"),
            site=metadata.get("site"),
        )

    def _other(self, other: NeuronSet) -> Bool[Tensor, "layer neuron"]:
        if not isinstance(other, NeuronSet):
            raise TypeError(
                f"A NeuronSet combines with a NeuronSet, not with {type(other).__name__}. "
                f"Make one of it with NeuronSet(pairs, layers={self.layers}, "
                f"neurons={self.neurons})."
            )
        if self.identity is not None and other.identity is not None:
            self.identity.check(other.identity, "One NeuronSet")
        if self.site != other.site:
            raise ValueError(
                f"NeuronSets of different sites do not mix: {self.site!r} and {other.site!r}. "
                "Keep them apart, and open one ablation inside the other."
            )
        if (self.layers, self.neurons) != (other.layers, other.neurons):
            raise ValueError(
                f"NeuronSets of different shapes do not mix: {self.layers} layers x "
                f"{self.neurons} neurons and {other.layers} x {other.neurons}. "
                f"Use sets of one model."
            )
        return other._member

    def _with(self, other: NeuronSet, member: Bool[Tensor, "layer neuron"]) -> NeuronSet:
        identity = better_known(self.identity, other.identity)
        means = other._means if self._means is None else self._means
        if self._means is not None and other._means is not None:
            # NaN differs from itself, so what was once in doubt stays so in any order of sets.
            means = self._means.where(self._means == other._means, torch.nan)
        return NeuronSet.from_mask(member, identity, means, self.site)


def _require_inside(
    index: Int64[Tensor, "pair 2"], layers: int, neurons: int, identity: ModelIdentity | None
) -> None:
    """Refuse pairs that are no neurons of the model."""
    outside = ((index < 0) | (index >= torch.tensor([layers, neurons]))).any(1)
    if outside.any():
        first = tuple(index[outside][0].tolist())
        raise ValueError(
            f"Neuron {first} (layer, neuron) lies outside {layers} layers x {neurons} neurons; "
            f"both count from 0."
        )
    if identity is None or identity.widths is None:
        return
    beyond = index[~identity.exists[index[:, 0], index[:, 1]]]
    if len(beyond):
        layer, neuron = beyond[0].tolist()
        raise ValueError(
            f"There is no neuron {neuron} in layer {layer}, which has {identity.widths[layer]}; "
            f"the widest layer has {neurons}."
        )
