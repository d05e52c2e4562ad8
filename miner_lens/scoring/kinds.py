"""NeuronKinds: which neurons are driven by a medium, by text, or by both (Xu et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from miner_lens.models.identity import ModelIdentity
from miner_lens.models.result import Result
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.selection import Selection

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN = "unknown"


def kind_shares(
    tops: Float[Tensor, "layer rank neuron"],
    medium: Float[Tensor, "layer rank neuron"],
    text: Float[Tensor, "layer rank neuron"],
    highest: Float[Tensor, "layer neuron"],
    medium_above: float = 2.0,
    text_above: float = 3.0,
) -> Float[Tensor, "kind layer neuron"]:
    """Of the samples that drive a neuron most, the shares of four kinds.

    A neuron's activations are scaled so that its highest is 10, and what is negative counts as 0. A
    sample drives it by the medium if enough tokens of the medium are above `medium_above`, and by
    text if enough text tokens are above `text_above`. Kinds are: the medium alone, text alone,
    both, neither.

    Args:
        tops: The highest activation in each of the samples that drive a neuron most; -inf where
            there are fewer samples.
        medium: In each of them, the activation that just enough tokens of the medium reach.
        text: The same of text tokens.
        highest: Each neuron's highest activation at all.
        medium_above: Threshold, on a scale from 0 to 10.
        text_above: Threshold of text tokens.

    Example:
        >>> tops, medium, text = (torch.tensor([[[v]]]) for v in (1.0, 0.5, 0.1))
        >>> kind_shares(tops, medium, text, torch.tensor([[1.0]]))[:, 0, 0].tolist()
        [1.0, 0.0, 0.0, 0.0]
    """
    there = tops > -torch.inf
    # A neuron that is never positive is driven by nothing.
    scale = 10 / highest.clamp(min=torch.finfo(highest.dtype).tiny)[:, None]
    alive = there & (highest > 0)[:, None]
    by_medium = alive & (medium * scale > medium_above)
    by_text = alive & (text * scale > text_above)
    kinds = [by_medium & ~by_text, by_text & ~by_medium, by_medium & by_text]
    kinds.append(there & ~by_medium & ~by_text)
    counts = torch.stack([kind.sum(1) for kind in kinds])
    return counts / there.sum(1).clamp(min=1)


@dataclass(frozen=True, eq=False, repr=False)
class NeuronKinds(Result):
    """Which neurons are driven by a medium, by text, by both or by neither.

    Attributes:
        shares: Of the samples that drive each neuron most, the share of each kind.
        kinds: Names of the first axis: the medium, `text`, `multimodal` and `unknown`.
        samples: How many samples were seen.
        identity: The model.
    """

    filename: ClassVar[str] = "neuron-kinds.safetensors"

    shares: Float[Tensor, "kind layer neuron"]
    kinds: tuple[str, ...]
    samples: int
    identity: ModelIdentity | None = None

    @property
    def labels(self) -> Int[Tensor, "layer neuron"]:
        """The place in `kinds` of each neuron's commonest kind; of equal ones the first."""
        return self.shares.argmax(0)

    def select(self, least: float = 0.0) -> Selection:
        """The neurons of each kind: a `NeuronSet` each, in which every neuron is once.

        Args:
            least: Leave out neurons whose commonest kind has a smaller share than this.

        Raises:
            ValueError: `least` lies outside 0 to 1.
        """
        if not 0 <= least <= 1:
            raise ValueError(f"least is a share and must lie in 0 to 1; got {least}.")
        labels, sure = self.labels, (self.shares.amax(0) >= least) & self._exists
        return Selection(
            (kind, NeuronSet.from_mask((labels == place) & sure, self.identity))
            for place, kind in enumerate(self.kinds)
        )

    @property
    def _exists(self) -> Bool[Tensor, "layer neuron"]:
        if self.identity is None:
            return torch.ones(self.shares.shape[1:], dtype=torch.bool)
        return self.identity.exists

    @property
    def _counts(self) -> Int[Tensor, " kind"]:
        return torch.bincount(self.labels[self._exists], minlength=len(self.kinds))

    def to_scores(self) -> ImportanceScores:
        """The shares of the medium and of text as scores, with the one metric `share`."""
        return ImportanceScores(
            self.shares[None, :2],
            self.kinds[:2],
            metrics=("share",),
            samples=self.samples,
            identity=self.identity,
        )

    def __repr__(self) -> str:
        _, layers, neurons = self.shares.shape
        counts = self._counts.tolist()
        lines = [f"NeuronKinds({layers} layers x {neurons} neurons, {self.samples} samples)"]
        for kind, count in zip(self.kinds, counts, strict=True):
            lines.append(f"{kind:<10}  {count:>8}  {count / sum(counts):7.1%}")
        return "\n".join(lines)

    def overview(self) -> pd.DataFrame:
        """How many neurons are of each kind, and their share of all."""
        import pandas as pd

        counts = self._counts
        columns = {"neurons": counts.tolist(), "share": (counts / counts.sum()).tolist()}
        return pd.DataFrame(columns, list(self.kinds)).rename_axis("kind")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the kinds holds."""
        return {"shares": self.shares}, {"kinds": self.kinds, "samples": self.samples}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> NeuronKinds:
        """The kinds that a file holds."""
        kinds, samples = tuple(metadata["kinds"]), metadata["samples"]
        return cls(tensors["shares"], kinds, samples, identity)
