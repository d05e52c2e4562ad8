"""What does each domain lose without each domain's neurons? A matrix, with random controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from miner_lens.data.labelled import labelled
from miner_lens.experiments.condition import Condition
from miner_lens.experiments.statistics import Comparison, against_controls, costs
from miner_lens.experiments.table import Trials
from miner_lens.experiments.trials import Item, trials
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.result import Result
from miner_lens.neurons.ablation import PreparedAblation
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.neurons.scaling import scaled

if TYPE_CHECKING:
    import pandas as pd

INTACT = "intact"
CONTROLS = "layer-matched"


@dataclass(frozen=True)
class SitesCondition(Condition):
    """Neurons of several sites, switched off or turned up together.

    Attributes:
        sets: The neurons, a set for each site.
        by: What they are multiplied by, as for `scale`.
    """

    sets: tuple[NeuronSet, ...] = ()
    by: float = 0.0

    def prepared(self, model: Any) -> list[PreparedAblation]:
        """The ablations that it comes to.

        Raises:
            ValueError: As `scale`.
        """
        return [PreparedAblation(model, neurons, scaled(self.by)) for neurons in self.sets]


@dataclass(frozen=True)
class Row:
    """A row of the matrix: whose neurons are changed, and where.

    Attributes:
        condition: The condition's name in the table of trials.
        off: The domain, or whatever else names the set.
        sites: The sites of its neurons.
        neurons: How many there are.
        controls: The names of its control conditions.
    """

    condition: str
    off: str
    sites: tuple[str, ...]
    neurons: int
    controls: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class DomainMatrix(Result):
    """Each domain under each domain's ablation, as trials, and what they amount to.

    Attributes:
        trials: Every sample under every condition; labels are the domains.
        rows: Which conditions there are.
        by: What the neurons were multiplied by; 0: they were off.
        identity: The model.
    """

    filename: ClassVar[str] = "domain-matrix.safetensors"

    trials: Trials
    rows: tuple[Row, ...]
    by: float = 0.0
    identity: ModelIdentity | None = None

    def to_frame(self) -> pd.DataFrame:
        """A table with a row for each set of neurons, domain and measure.

        Columns: `off` (whose neurons), `sites`, `neurons`, `on` (the domain of the samples), and
        those of `miner_lens.experiments.statistics.against_controls`: `measure`, `samples`, `cost`
        with its interval, `control` with the range of the controls, `difference` with its interval,
        `p`, `p_holm` over the whole matrix, and `beyond_chance`.

        Raises:
            ValueError: A domain has fewer than two samples.
            ImportError: scipy or statsmodels is missing.
        """
        wanted = [Comparison(row.condition, CONTROLS, row.controls) for row in self.rows]
        table = against_controls(self.trials.to_frame(), wanted, INTACT)
        about = {row.condition: row for row in self.rows}
        table = table.rename(columns={"label": "on"}).drop(columns="against")
        rows = [about[name] for name in table.pop("condition")]
        table.insert(0, "off", [row.off for row in rows])
        table.insert(1, "sites", ["+".join(row.sites) for row in rows])
        table.insert(2, "neurons", [row.neurons for row in rows])
        return table

    def matrix(self, measure: str = "logprob") -> pd.DataFrame:
        """Mean costs: a row for each set of neurons and their sites, a column for each domain.

        Args:
            measure: `"logprob"`, in nats, or `"correct"`.
        """
        table = costs(self.trials.to_frame(), INTACT)
        table = table[table["measure"] == measure]
        wide = table.pivot(index="condition", columns="label", values="cost")
        wide = wide.loc[[row.condition for row in self.rows]]
        wide.columns.name = "on"
        wide.index.name = "off"
        return wide

    def __repr__(self) -> str:
        done = "off" if self.by == 0 else f"times {self.by:g}"
        samples = len(self.trials.samples)
        head = f"DomainMatrix(neurons {done}, {samples} samples; cost of logprob in nats)"
        return f"{head}\n{self.matrix().round(3).to_string()}"

    def overview(self) -> pd.DataFrame:
        """Mean costs of the log-probability, as `matrix` has them."""
        return self.matrix()

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the matrix holds."""
        tensors: dict[str, Tensor | None] = {
            "correct": torch.from_numpy(self.trials.correct),
            "logprob": torch.from_numpy(self.trials.logprob),
        }
        return tensors, {
            "samples": self.trials.samples,
            "labels": self.trials.labels,
            "conditions": self.trials.conditions,
            "rows": [vars(row) for row in self.rows],
            "by": self.by,
        }

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> DomainMatrix:
        """The matrix that a file holds."""
        table = Trials(
            tuple(metadata["samples"]),
            tuple(metadata["labels"]),
            tuple(metadata["conditions"]),
            tensors["correct"].numpy(),
            tensors["logprob"].numpy(),
        )
        rows = [
            Row(**(row | {"sites": tuple(row["sites"]), "controls": tuple(row["controls"])}))
            for row in metadata["rows"]
        ]
        return cls(table, tuple(rows), metadata["by"], identity)


def domain_matrix(
    model: Any,
    data: Iterable[Item] | Mapping[str, Iterable[Any]],
    *selections: Mapping[str, NeuronSet],
    sites: Sequence[Sequence[str]] | None = None,
    by: float = 0.0,
    seeds: int = 3,
    batch_size: int = 16,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> DomainMatrix:
    """Switch off each domain's neurons, in any combination of sites, and try every domain.

    Beside each set stand its controls: as many random neurons in each layer (`random_like`), one
    condition for each seed. The measures are those of `ml.trials`. Neurons should be selected on
    other samples than these.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers and labels, or a mapping of domains to samples.
        selections: What `DomainCounts.select` returns, one for each site. Any other mapping of
            names to sets will do, such as modality-specific neurons.
        sites: The combinations to try, such as `[["llm"], ["llm", "vision"]]`; by default each site
            by itself and all together. Where a domain has no neurons, there is no row.
        by: What the neurons are multiplied by: 0 is off, 2 doubles.
        seeds: Of the controls.
        batch_size: Samples in one forward pass.
        progress: Whether to show a progress bar.
        checkpoint: A folder from which trials that were stopped continue, as for `ml.trials`.

    Raises:
        ValueError: No neurons at all, two selections of one site, a combination with a site that is
            not selected, fewer than one seed, samples without labels, or as `ml.trials`.

    Example:
        matrix = ml.domain_matrix(model, data, llm.select(), vision.select())
        matrix.to_frame()
    """
    here = _by_site(selections)
    if seeds < 1:
        raise ValueError(f"The matrix needs at least one seed of controls, not {seeds}.")
    if sites is None:
        sites = [[site] for site in here] + ([list(here)] if len(here) > 1 else [])
    for combination in sites:
        unknown = [site for site in combination if site not in here]
        if unknown or not combination or len(set(combination)) < len(combination):
            raise ValueError(
                f"sites has the combination {list(combination)}; name sites that are selected, "
                f"each once: {', '.join(here)}."
            )
    rows, conditions = [], [Condition(INTACT)]
    for off in dict.fromkeys(name for selection in here.values() for name in selection):
        for combination in sites:
            chosen = [here[site][off] for site in combination if off in here[site]]
            sets = tuple(neurons for neurons in chosen if len(neurons))
            if not sets:
                continue
            name = f"{off} in {'+'.join(combination)}"
            controls = tuple(f"{name}, control {seed}" for seed in range(seeds))
            conditions.append(SitesCondition(name, sets=sets, by=by))
            for seed, control in enumerate(controls):
                drawn = tuple(NeuronSet.random_like(one, seed) for one in sets)
                conditions.append(SitesCondition(control, sets=drawn, by=by))
            rows.append(Row(name, off, tuple(combination), sum(map(len, sets)), controls))
    if not rows:
        raise ValueError("No domain has any neurons, so there is nothing to switch off.")
    samples = labelled(data) if isinstance(data, Mapping) else data
    table = trials(model, samples, conditions, batch_size, progress, checkpoint=checkpoint)
    if None in table.labels:
        raise ValueError(
            "A sample has no label, so nobody knows its domain. Give data sets by name, "
            "{'code': a, 'prose': b}, or samples with label=."
        )
    identities = (one.identity for selection in here.values() for one in selection.values())
    return DomainMatrix(table, tuple(rows), by, next(identities, None))


def _by_site(selections: Sequence[Mapping[str, NeuronSet]]) -> dict[str, Mapping[str, NeuronSet]]:
    """Each selection by the site of its neurons."""
    found: dict[str, Mapping[str, NeuronSet]] = {}
    for selection in selections:
        own = {neurons.site for neurons in selection.values()}
        if len(own) != 1 or own & found.keys():
            raise ValueError(
                "Give one selection for each site, as DomainCounts.select returns it; one of these "
                f"is of {', '.join(sorted(own)) or 'no site'}, and there are {len(selections)}."
            )
        found[own.pop()] = selection
    if not found:
        raise ValueError("Give at least one selection, as DomainCounts.select returns it.")
    return found
