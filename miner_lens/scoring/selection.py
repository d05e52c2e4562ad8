"""Selection: what `select` returns, a set of neurons for each modality."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from miner_lens.models.identity import ModelIdentity, better_known
from miner_lens.models.result import Result
from miner_lens.neurons.neuron_set import NeuronSet

if TYPE_CHECKING:
    import pandas as pd


class Selection(dict[str, NeuronSet], Result):
    """Modality to `NeuronSet`, as `select` returns it; asking for another modality says why.

    Example:
        >>> sets = {"image": NeuronSet([(0, 1)], layers=2, neurons=4)}
        >>> Selection(sets)
        Selection(1 of 8 neurons; image: 1)
    """

    filename: ClassVar[str] = "selection.safetensors"

    @property
    def identity(self) -> ModelIdentity | None:  # type: ignore[override]
        """The model that the neurons belong to, where it is known."""
        known = [chosen.identity for chosen in self.values()]
        return reduce(better_known, known) if known else None

    def __repr__(self) -> str:
        if not self:
            return "Selection(no neurons)"
        total = max(chosen.total for chosen in self.values())
        counts = ", ".join(f"{modality}: {len(chosen)}" for modality, chosen in self.items())
        return f"Selection({sum(map(len, self.values()))} of {total} neurons; {counts})"

    def to_frame(self) -> pd.DataFrame:
        """A table of the columns modality, site, layer and neuron, one row a neuron."""
        import pandas as pd

        tables = {modality: chosen.to_frame() for modality, chosen in self.items()}
        if not tables:
            return pd.DataFrame(columns=["modality", "site", "layer", "neuron"])
        table = pd.concat(tables, names=["modality"]).reset_index("modality")
        return table.reset_index(drop=True)

    def overview(self) -> pd.DataFrame:
        """How many neurons each modality has, their share of all, and the layers that have any."""
        import pandas as pd

        rows = {
            modality: {
                "site": chosen.site,
                "neurons": len(chosen),
                "share": len(chosen) / chosen.total,
                "layers": len(chosen.by_layer()),
            }
            for modality, chosen in self.items()
        }
        columns = ["site", "neurons", "share", "layers"]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        return table.rename_axis("modality")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the selection holds."""
        tensors: dict[str, Tensor | None] = {}
        sets: dict[str, Any] = {}
        for modality, chosen in self.items():
            parts, metadata = chosen.to_parts()
            tensors |= {f"{modality}.{name}": tensor for name, tensor in parts.items()}
            identity = None if chosen.identity is None else chosen.identity.to_dict()
            sets[modality] = metadata | {"identity": identity}
        return tensors, {"sets": sets}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> Selection:
        """The selection that a file holds."""
        sets = cls()
        for modality, one in metadata["sets"].items():
            start = f"{modality}."
            parts = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            known = None if one["identity"] is None else ModelIdentity.from_dict(one["identity"])
            sets[modality] = NeuronSet.from_parts(parts, one, known)
        return sets

    def __missing__(self, modality: str) -> NeuronSet:
        raise KeyError(
            f"No neurons were selected for {modality!r}, only for {', '.join(self)}: it never "
            "occurs in the data, or is not part of the split."
        )
