"""SampleCurves: what is measured of each sample, layer and modality, as curves over layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from jaxtyping import Float, Int
from torch import Tensor

from miner_lens.models.identity import ModelIdentity
from miner_lens.models.result import Result
from miner_lens.scoring.curves import curve

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class SampleCurves(Result):
    """Measures of each sample, by layer and modality.

    Attributes:
        values: The `measures`; 0 where the sample has no token of the modality.
        counts: How many tokens of the modality each sample has.
        modalities: Names of the third axis.
        measures: Names of the fourth axis.
        identity: The model.
    """

    measures: ClassVar[tuple[str, ...]]

    values: Float[Tensor, "sample layer modality measure"]
    counts: Int[Tensor, "sample modality"]
    modalities: tuple[str, ...]
    identity: ModelIdentity | None = field(default=None, kw_only=True)

    def of(self, modality: str, measure: str | None = None) -> Float[Tensor, "sample layer"]:
        """A measure, by default the first one, in the samples that have tokens of the modality.

        Raises:
            KeyError: There is no such modality or measure.
        """
        measure = self.measures[0] if measure is None else measure
        for name, known in ((modality, self.modalities), (measure, self.measures)):
            if name not in known:
                raise KeyError(f"There is no {name!r} here; there are {', '.join(known)}.")
        place = self.modalities.index(modality)
        return self.values[self.counts[:, place] > 0][:, :, place, self.measures.index(measure)]

    def curves(self, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Means over samples by layer, with 95 % percentile bootstrap intervals over samples.

        Returns:
            A table of the columns modality, measure, layer, samples, mean, low and high. Modalities
            that fewer than two samples have are left out.

        Raises:
            ImportError: scipy is missing.
        """
        import pandas as pd

        tables = []
        for modality, measure in self.pairs():
            values = self.of(modality, measure).double().numpy()
            found = curve(values, resamples, seed)
            table = pd.DataFrame({"layer": range(values.shape[1]), "samples": len(values)})
            table.insert(0, "modality", modality)
            table.insert(1, "measure", measure)
            tables.append(table.assign(mean=found.mean, low=found.low, high=found.high))
        return pd.concat(tables, ignore_index=True)

    def overview(self) -> pd.DataFrame:
        """The mean of the first measure at each modality, layer by layer."""
        import pandas as pd

        table = pd.DataFrame({name: self.of(name).mean(0).cpu().numpy() for name in self.known()})
        return table.rename_axis("layer")

    def known(self, least: int = 1) -> list[str]:
        """The modalities that at least so many samples have."""
        enough = ((self.counts > 0).sum(0) >= least).tolist()
        return [name for name, there in zip(self.modalities, enough, strict=True) if there]

    def pairs(self, least: int = 2) -> Iterator[tuple[str, str]]:
        """These modalities, each with each measure."""
        for modality in self.known(least):
            yield from ((modality, measure) for measure in self.measures)

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the measures holds."""
        return {"values": self.values, "counts": self.counts}, {"modalities": self.modalities}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> Self:
        """The measures that a file holds."""
        modalities = tuple(metadata["modalities"])
        return cls(tensors["values"], tensors["counts"], modalities, identity=identity)
