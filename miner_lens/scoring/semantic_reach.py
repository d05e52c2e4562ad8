"""SemanticReach: whether media reach out towards text, and special tokens stand at its ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from miner_lens.models.identity import ModelIdentity
from miner_lens.models.result import Result
from miner_lens.scoring.curves import curve

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("probing", "telomeres")


@dataclass(frozen=True, eq=False, repr=False)
class SemanticReach(Result):
    """Semantic probing and semantic telomeres of each sample, by layer.

    The two are MINER's words (Huang et al. 2024) for what its figures show; the numbers are ours.

    Attributes:
        values: By measure and modality, such as `probing/image` or `telomeres/special`, the
            measure of each sample that has enough tokens. The first labelling is the true one; in
            the others the sample's tokens are shuffled between the modality and text.
        samples: By the same names, the places of these samples in the data.
        identity: The model.
    """

    filename: ClassVar[str] = "semantic-reach.safetensors"

    values: Mapping[str, Float[Tensor, "sample layer labelling"]]
    samples: Mapping[str, Int[Tensor, " sample"]]
    identity: ModelIdentity | None = None

    def curves(self, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Each measure in each layer, with its interval over samples and its null.

        Returns:
            A table of the columns modality, measure, layer, samples, mean (over samples), low and
            high (95 % percentile bootstrap interval over samples), null, null_low and null_high
            (mean, least and greatest of the shuffles' means over samples). What fewer than two
            samples have is left out.

        Raises:
            ValueError: No measure is of two samples.
            ImportError: scipy is missing.
        """
        import pandas as pd

        tables = []
        for measure, modality, values in self._measured(2):
            found = curve(values[..., 0].double().numpy(), resamples, seed)
            null = values[..., 1:].double().mean(0)
            table = pd.DataFrame({"layer": range(values.shape[1]), "samples": len(values)})
            table.insert(0, "modality", modality)
            table.insert(1, "measure", measure)
            table = table.assign(mean=found.mean, low=found.low, high=found.high)
            low, high = null.amin(1), null.amax(1)
            tables.append(
                table.assign(
                    null=null.mean(1).numpy(), null_low=low.numpy(), null_high=high.numpy()
                )
            )
        if not tables:
            raise ValueError("No measure is of two samples or more, so there are no curves.")
        return pd.concat(tables, ignore_index=True)

    def __repr__(self) -> str:
        lines = ["SemanticReach(mean over samples, layer by layer)"]
        for measure, modality, values in self._measured(1):
            row = values[..., 0].mean(0).tolist()
            name = f"{measure} of {modality}"
            lines.append(f"{name:<22}" + "".join(f" {value:6.2f}" for value in row))
        return "\n".join(lines)

    def overview(self) -> pd.DataFrame:
        """The mean of each measure, layer by layer."""
        import pandas as pd

        columns = {
            f"{measure} of {modality}": values[..., 0].mean(0).numpy()
            for measure, modality, values in self._measured(1)
        }
        return pd.DataFrame(columns).rename_axis("layer")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the result holds."""
        tensors: dict[str, Tensor | None] = {f"values/{k}": t for k, t in self.values.items()}
        tensors |= {f"samples/{name}": tensor for name, tensor in self.samples.items()}
        return tensors, {"names": tuple(self.values)}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> SemanticReach:
        """The result that a file holds."""
        values, samples = (
            {name: tensors[f"{part}/{name}"] for name in metadata["names"]}
            for part in ("values", "samples")
        )
        return cls(values, samples, identity)

    def _measured(self, least: int) -> Iterator[tuple[str, str, Tensor]]:
        for name, values in self.values.items():
            if len(values) >= least:
                measure, _, modality = name.partition("/")
                yield measure, modality, values
