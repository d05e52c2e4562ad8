"""DomainCounts: how often each neuron is active in each domain, over any number of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from miner_lens.models.identity import ModelIdentity, better_known
from miner_lens.models.result import Result
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring import lape
from miner_lens.scoring.selection import Selection

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class DomainCounts(Result):
    """How often each neuron was positive at the tokens of each domain (MMNeuron).

    Counts over the same model and domains add up: `a + b` is what both have seen.

    Attributes:
        over_zero: Positive activations, whole numbers.
        tokens: Tokens of each domain (in a tower: rows, such as patches).
        domains: Names of the last axis.
        identity: The model that was counted in.
        info: What else to keep with the counts, as JSON can hold it.

    Raises:
        ValueError: Names, tokens or identity do not fit the counts, or a neuron was positive more
            often than there are tokens.

    Example:
        >>> over_zero = torch.tensor([[[9, 0], [0, 8], [5, 5], [1, 1]]])
        >>> counts = DomainCounts(over_zero, torch.tensor([10, 10]), ["code", "prose"])
        >>> counts.select(top_rate=0.5, filter_rate=0.5, bar_ratio=0.5)["code"]
        NeuronSet(1 of 4 neurons, 1 layers)
    """

    filename: ClassVar[str] = "domain-counts.safetensors"

    over_zero: Int[Tensor, "layer neuron domain"]
    tokens: Int[Tensor, " domain"]
    domains: Sequence[str]
    identity: ModelIdentity | None = field(default=None, kw_only=True)
    info: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        fix = object.__setattr__
        for name in ("over_zero", "tokens"):
            tensor = getattr(self, name)
            if tensor.is_floating_point():
                raise ValueError(f"{name} must be whole numbers, not {tensor.dtype}.")
            fix(self, name, tensor.detach().cpu().long().clone())
        fix(self, "domains", tuple(self.domains))
        fix(self, "info", dict(self.info))
        names, shape = self.domains, tuple(self.over_zero.shape)
        if len(shape) != 3 or shape[2] != len(names) or tuple(self.tokens.shape) != shape[2:]:
            raise ValueError(
                f"over_zero has shape {list(shape)} and tokens {list(self.tokens.shape)}; expected "
                f"[layer neuron domain] and [domain] for {len(names)} domains ({', '.join(names)})."
            )
        if len(set(names)) != len(names):
            raise ValueError(f"A domain is named twice: {', '.join(names)}.")
        if (self.over_zero < 0).any() or (self.over_zero > self.tokens).any():
            raise ValueError(
                "over_zero must lie between 0 and the domain's tokens: a neuron cannot be positive "
                "more often than it was looked at."
            )
        model = self.identity
        if model is not None and (model.layers, model.neurons) != shape[:2]:
            raise ValueError(
                f"over_zero has {shape[0]} layers x {shape[1]} neurons; {model.name} has "
                f"{model.layers} x {model.neurons}. Pass the identity of the model that was read."
            )

    @property
    def site(self) -> str:
        """Where the neurons live."""
        return "llm" if self.identity is None else self.identity.site

    @property
    def probabilities(self) -> Float[Tensor, "layer neuron domain"]:
        """The share of each domain's tokens at which a neuron is positive; NaN without tokens."""
        return lape.probabilities(self.over_zero, self.tokens)

    @property
    def entropy(self) -> Float[Tensor, "layer neuron"]:
        """Of each neuron over domains, in nats: low where it is active in few of them.

        Raises:
            ValueError: A domain has no tokens.
        """
        self._require_tokens()
        return lape.entropy(self.probabilities)

    def select(
        self, top_rate: float = 0.01, filter_rate: float = 0.95, bar_ratio: float = 0.95
    ) -> Selection:
        """Domain-specific neurons by LAPE, as published: for each domain a set of them.

        A neuron may be of several domains, and a domain may have none.

        Args:
            top_rate: Share of the site's neurons to take, those with the lowest entropy.
            filter_rate: Only neurons that in some domain are active more often than this share of
                all pairs of neuron and domain.
            bar_ratio: A neuron is a domain's if it is active there more often than this share of
                all pairs.

        Raises:
            ValueError: There are fewer than two domains, one without tokens, or a rate outside
                (0, 1].
        """
        if len(self.domains) < 2:
            raise ValueError(
                f"Neurons are specific to one domain among several; there is {len(self.domains)} "
                f"({', '.join(self.domains)}). Count over data with two labels at least."
            )
        self._require_tokens()
        there = self._exists
        found = lape.lape(
            self.over_zero[there][None], self.tokens, top_rate, filter_rate, bar_ratio
        )
        masks = torch.zeros(len(self.domains), *there.shape, dtype=torch.bool)
        masks = masks.masked_scatter(there, found)
        return Selection(
            (domain, NeuronSet.from_mask(mask, self.identity))
            for domain, mask in zip(self.domains, masks, strict=True)
        )

    def to_frame(self) -> pd.DataFrame:
        """A long table of the columns site, layer, neuron, domain, over_zero and tokens."""
        import pandas as pd

        layers, neurons, _ = self.over_zero.shape
        axes = [range(layers), range(neurons), self.domains]
        index = pd.MultiIndex.from_product(axes, names=["layer", "neuron", "domain"])
        tokens = self.tokens.expand(self.over_zero.shape).flatten().numpy()
        columns = {"over_zero": self.over_zero.flatten().numpy(), "tokens": tokens}
        table = pd.DataFrame(columns, index=index).reset_index()
        table.insert(0, "site", self.site)
        there = self._exists[..., None].expand(self.over_zero.shape).flatten().numpy()
        return table[there].reset_index(drop=True)

    def __add__(self, other: DomainCounts) -> DomainCounts:
        if not isinstance(other, DomainCounts):
            return NotImplemented
        if self.identity is not None and other.identity is not None:
            self.identity.check(other.identity, "One DomainCounts")
        if self.over_zero.shape[:2] != other.over_zero.shape[:2]:
            raise ValueError(
                f"Counts of different models do not add up: {list(self.over_zero.shape[:2])} and "
                f"{list(other.over_zero.shape[:2])} layers and neurons."
            )
        domains = list(dict.fromkeys([*self.domains, *other.domains]))
        over_zero = self.over_zero.new_zeros(*self.over_zero.shape[:2], len(domains))
        tokens = self.tokens.new_zeros(len(domains))
        for one in (self, other):
            places = torch.tensor([domains.index(name) for name in one.domains])
            over_zero.index_add_(2, places, one.over_zero)
            tokens.index_add_(0, places, one.tokens)
        known = better_known(self.identity, other.identity)
        info = self.info if self.info == other.info else {}
        return DomainCounts(over_zero, tokens, domains, identity=known, info=info)

    def __radd__(self, other: object) -> DomainCounts:
        """So that `sum` works, which begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __repr__(self) -> str:
        layers, neurons, _ = self.over_zero.shape
        model = "" if self.identity is None else f" of {self.identity.name}"
        name = max(len("domain"), *map(len, self.domains), 0)
        rows = [f"{'domain':<{name}}  {'tokens':>9}  {'positive':>8}"]
        shares = self.probabilities[self._exists].mean(0)
        for domain, tokens, share in zip(
            self.domains, self.tokens.tolist(), shares.tolist(), strict=True
        ):
            rows.append(f"{domain:<{name}}  {tokens:>9}  {share:>8.4f}")
        site = "" if self.site == "llm" else f", site={self.site!r}"
        return "\n".join([f"DomainCounts({layers} layers x {neurons} neurons{site}{model})", *rows])

    def overview(self) -> pd.DataFrame:
        """Of each domain, its tokens and the share of positive activations."""
        import pandas as pd

        columns = {
            "tokens": self.tokens.tolist(),
            "positive": self.probabilities[self._exists].mean(0).tolist(),
        }
        return pd.DataFrame(columns, list(self.domains)).rename_axis("domain")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the counts holds."""
        metadata = {"domains": self.domains, "info": self.info}
        return {"over_zero": self.over_zero, "tokens": self.tokens}, metadata

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> DomainCounts:
        """The counts that a file holds."""
        return cls(
            tensors["over_zero"],
            tensors["tokens"],
            metadata["domains"],
            identity=identity,
            info=metadata["info"],
        )

    @property
    def _exists(self) -> Bool[Tensor, "layer neuron"]:
        if self.identity is None:
            return torch.ones(self.over_zero.shape[:2], dtype=torch.bool)
        return self.identity.exists

    def _require_tokens(self) -> None:
        for domain, tokens in zip(self.domains, self.tokens.tolist(), strict=True):
            if tokens < 1:
                raise ValueError(
                    f"Domain {domain!r} has no tokens in site {self.site!r}, so nothing is known "
                    "of its neurons. Leave it out, or count in a site that its data reach."
                )
