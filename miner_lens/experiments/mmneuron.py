"""MMNeuron's protocol, step by step into a folder, from which it goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from miner_lens import launchers
from miner_lens.analyzers.domains import DomainAnalyzer
from miner_lens.analyzers.lens import LogitLens, LogitLensAnalyzer
from miner_lens.data.sample import Sample
from miner_lens.experiments.domains import DomainMatrix, domain_matrix
from miner_lens.experiments.layers import LayerDistribution, layer_distribution
from miner_lens.experiments.record import keep_record
from miner_lens.models.inside import hf_model_of
from miner_lens.models.result import Result
from miner_lens.models.sites import sites
from miner_lens.running.run import run
from miner_lens.scoring.domain_counts import DomainCounts
from miner_lens.scoring.selection import Selection

if TYPE_CHECKING:
    import pandas as pd

# The data sets of the paper, each a domain.
DATA_SETS = ("vqav2", "docvqa", "pmc_vqa", "lingoqa", "rs_vqa")

R = TypeVar("R", bound=Result)


@dataclass(frozen=True, eq=False, repr=False)
class MMNeuron:
    """What MMNeuron's protocol gives.

    Attributes:
        counts: Positive activations by domain, for each site that all domains reach.
        selections: Each domain's neurons (LAPE), by site.
        matrix: Each domain without each domain's neurons, beside random ones.
        lenses: The logit lens on each domain.
    """

    counts: Mapping[str, DomainCounts]
    selections: Mapping[str, Selection]
    matrix: DomainMatrix
    lenses: Mapping[str, LogitLens]

    @cached_property
    def layers(self) -> dict[str, LayerDistribution]:
        """In which layers each domain's neurons lie, by site."""
        return {site: layer_distribution(chosen) for site, chosen in self.selections.items()}

    @cached_property
    def entropy(self) -> pd.DataFrame:
        """The logit lens's entropy by domain, modality and layer, as `LogitLens.curves` has it."""
        import pandas as pd

        tables = []
        for domain, lens in self.lenses.items():
            table = lens.curves()
            tables.append(table[table["measure"] == "entropy"].assign(domain=domain))
        return pd.concat(tables, ignore_index=True)

    def results(self) -> dict[str, Any]:
        """What each step gave, by name, for `ml.report`."""
        found: dict[str, Any] = {"what it says": self.summary}
        for site, chosen in self.selections.items():
            found |= {f"neurons of the {site}": chosen, f"layers of the {site}": self.layers[site]}
        found |= {"domains without neurons": self.matrix, "costs": self.matrix.to_frame()}
        return found | {f"lens on {domain}": lens for domain, lens in self.lenses.items()}

    @property
    def summary(self) -> str:
        """What each step says, in a sentence each."""
        said = [f"{site}: {layers.summary}" for site, layers in self.layers.items()]
        table = self.matrix.to_frame()
        rows = table[table["measure"] == "logprob"]
        own = rows[rows["off"] == rows["on"]]
        said.append(
            f"Of {len(own)} sets, {int(own['beyond_chance'].sum())} cost their own domain more "
            f"log-probability than chance; of {len(rows) - len(own)} pairs of a set and another "
            f"domain, {int(rows['beyond_chance'].sum() - own['beyond_chance'].sum())}."
        )
        for domain, lens in self.lenses.items():
            changes = [
                f"{modality} at {', '.join(map(str, found.layers)) or 'no layer'}"
                for modality, found in lens.stages().items()
            ]
            said.append(f"On {domain}, entropy changes course: {'; '.join(changes)}.")
        return "\n".join(said)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{site} {len(one.domains)} domains" for site, one in self.counts.items())
        return f"MMNeuron({sizes})\n{self.summary}"


def mmneuron(
    model: Any,
    data: Mapping[str, Sequence[Sample]],
    folder: str | Path,
    tried: int = 50,
    top_rate: float = 0.01,
    seeds: int = 3,
    batch_size: int = 8,
    progress: bool = True,
) -> MMNeuron:
    """Go through MMNeuron's protocol (Huo et al. 2024, arXiv 2406.11193).

    Domain counts in each site, LAPE selection, switching off each domain's neurons (in each site
    and in all) on every domain beside random ones, and the logit lens on each domain. Every step is
    a file of the folder; called again with the same arguments, it goes on from what is there.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, by domain.
        folder: Where files go.
        tried: So many samples of each domain, the last ones, are tried and looked at through the
            lens; the others are counted.
        top_rate: Share of a site's neurons to select.
        seeds: Of the random neurons.
        batch_size: Samples in one forward pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: Fewer than two domains, one with fewer than `tried` samples and one more, or a
            folder of another protocol.

    Example:
        data = {name: ml.datasets.load(name, limit=250) for name in ("vqav2", "docvqa")}
        print(ml.experiments.mmneuron(model, data, "results").summary)
    """
    folder = Path(folder)
    if len(data) < 2 or tried < 2:
        raise ValueError(
            f"The protocol is of two domains at least, and of two tried samples of each; there "
            f"are {len(data)} domains and {tried} samples."
        )
    for name, some in data.items():
        if len(some) <= tried:
            raise ValueError(
                f"Domain {name!r} has {len(some)} samples; {tried} are tried, and at least one "
                "more is counted. Load more, or try fewer."
            )
    counted = {name: some[:-tried] for name, some in data.items()}
    others = {name: some[-tried:] for name, some in data.items()}
    keep_record(folder, model, data, {"tried": tried, "top_rate": top_rate, "seeds": seeds})
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    counts = _counts(model, counted, folder, how)
    selections = {
        site: _kept(
            folder / f"neurons-{site}.safetensors", Selection, partial(one.select, top_rate)
        )
        for site, one in counts.items()
    }
    matrix = _kept(
        folder / "matrix.safetensors",
        DomainMatrix,
        lambda: domain_matrix(
            model,
            others,
            *selections.values(),
            seeds=seeds,
            checkpoint=folder / "checkpoints" / "matrix",
            **how,
        ),
    )
    lenses = {}
    for name, some in others.items():
        file = f"lens-{name.replace(':', '-')}"
        look = partial(run, model, some, checkpoint=folder / "checkpoints" / file, **how)
        lenses[name] = _kept(
            folder / f"{file}.safetensors", LogitLens, partial(look, LogitLensAnalyzer())
        )
    return MMNeuron(counts, selections, matrix, lenses)


def _counts(
    model: Any, data: Mapping[str, Sequence[Sample]], folder: Path, how: Mapping[str, Any]
) -> dict[str, DomainCounts]:
    """Counts in each site that all domains reach; all sites are read in one pass."""
    names = list(sites(hf_model_of(model)))
    paths = {site: folder / f"counts-{site}.safetensors" for site in names}
    if all(path.is_file() for path in paths.values()):
        found = [DomainCounts.load(path) for path in paths.values()]
    else:
        readers = [DomainAnalyzer(site) for site in names]
        kept = folder / "checkpoints" / "counts"
        result = run(model, data, *readers, checkpoint=kept, **how)
        found = [result] if isinstance(result, DomainCounts) else list(result)
        for path, one in zip(paths.values(), found, strict=True):
            _save(one, path)
    reached = {one.site: one for one in found if (one.tokens > 0).all()}
    return {site: reached[site] for site in names if site in reached}


def _kept(path: Path, kind: type[R], make: Callable[[], R]) -> R:
    """What a file holds, or what is made now and written to it."""
    if path.is_file():
        return kind.load(path)
    made = make()
    _save(made, path)
    return made


def _save(result: Result, path: Path) -> None:
    if launchers.rank() == 0:  # all ranks have it
        result.save(path)
