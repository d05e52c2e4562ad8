"""What an experiment switches off, and what its table of trials says that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from miner_lens.experiments.asking import Metric, Reading
from miner_lens.experiments.condition import Condition
from miner_lens.experiments.statistics import averaged, costs
from miner_lens.experiments.table import Trials
from miner_lens.experiments.trials import Item as Item
from miner_lens.experiments.trials import trials
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.select import combine, default_weights

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

INTACT = "intact"
Data = Iterable[Item] | Mapping[str, Iterable[Item]]
Weights = Sequence[float] | Mapping[str, float] | None
# A set, or one for each seed of a control.
Sets = NeuronSet | Sequence[NeuronSet]


class Options(TypedDict, total=False):
    """How trials are made, as `ml.trials` takes it."""

    batch_size: int
    progress: bool
    metric: Metric | Reading
    conditions_per_batch: int
    checkpoint: str | Path | None


@dataclass(frozen=True)
class Ablation:
    """A row of a plan: neurons to switch off, or a control of several draws.

    Attributes:
        name: What its conditions' names begin with; a row's own.
        about: What tells it from other rows, column by column of the result.
        conditions: One, or one for each seed of a control.
    """

    name: str
    about: Mapping[str, Any]
    conditions: tuple[Condition, ...]

    @classmethod
    def of(cls, name: str, sets: Sets, about: Mapping[str, Any], **how: Any) -> Ablation:
        """A row that switches off a set, or each of several; `how` is as for `Condition`."""
        if isinstance(sets, NeuronSet):
            return cls(name, about, (Condition(name, sets, **how),))
        named = (Condition(f"{name}, seed {n}", one, **how) for n, one in enumerate(sets))
        return cls(name, about, tuple(named))

    @property
    def neurons(self) -> int:
        """How many neurons are off."""
        first = self.conditions[0]
        chosen = first.neurons
        if not isinstance(chosen, NeuronSet):
            return 0
        return len(~chosen) if first.complement else len(chosen)


@dataclass(frozen=True)
class Plan:
    """The rows of an experiment's table.

    Attributes:
        rows: The ablations.
        seeds: Those that the controls were drawn by.
    """

    rows: tuple[Ablation, ...]
    seeds: tuple[int, ...] = ()

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """By row, the names of its conditions in the table of trials.

        What several rows switch off in the same way is tried once, under the first name. Where
        nothing is off, that is the intact model.
        """
        first: dict[Any, str] = {None: INTACT}
        return {
            row.name: [first.setdefault(_done(one), one.name) for one in row.conditions]
            for row in self.rows
        }

    @cached_property
    def conditions(self) -> list[Condition]:
        """The intact model, and what is to be tried of the rows."""
        tried: dict[Any, Condition] = {None: Condition(INTACT)}
        for row in self.rows:
            for one in row.conditions:
                tried.setdefault(_done(one), one)
        return list(tried.values())

    def run(self, model: Any, data: Data, options: Options) -> Trials:
        """Try all conditions on all samples."""
        return trials(model, data, self.conditions, **options)

    def about(self, table: Trials) -> dict[str, Any]:
        """What to keep with a result that is read from a table: what was run."""
        about = {
            "identity": None if table.identity is None else table.identity.to_dict(),
            "samples": len(table.samples),
            "seeds": list(self.seeds),
        }
        return {name: one for name, one in about.items() if one}

    def costs(self, table: Trials) -> pd.DataFrame:
        """What each row costs, by label and measure, with 95 % bootstrap intervals over samples.

        Returns:
            The intact model and then the rows: `label` (`all` where samples have none),
            `condition`, the columns of `about`, `neurons`, `seeds`, and what `statistics.costs`
            says: `measure`, `samples`, `value`, `cost`, `low`, `high`.

        Raises:
            ValueError: The table lacks a condition of the plan, or as `statistics.costs`.
        """
        import pandas as pd

        joined = averaged(frame_of(table), {INTACT: [INTACT], **self.groups})
        found = costs(joined, INTACT)
        rows = [
            {
                "condition": row.name,
                **row.about,
                "neurons": row.neurons,
                "seeds": len(row.conditions),
            }
            for row in self.rows
        ]
        blank: dict[str, Any] = {key: "" for key, one in rows[0].items() if isinstance(one, str)}
        blank |= {key: 0 for key in rows[0] if key not in blank}
        about = pd.DataFrame([{**blank, "condition": INTACT}, *rows])
        merged = found.merge(about, on="condition", how="left")
        order = ["label", *about.columns, "measure", "samples", "value", "cost", "low", "high"]
        return merged[order]


def frame_of(table: Trials) -> pd.DataFrame:
    """A table of trials in which samples without a label have the label `all`."""
    frame = table.to_frame()
    frame["label"] = frame["label"].fillna("all")
    return frame


def weighted(
    scores: ImportanceScores, names: Sequence[str], weights: Weights = None
) -> Float[Tensor, "modality layer neuron"]:
    """What a selection ranks the neurons of some modalities by; -inf where there is none."""
    places = [scores.modalities.index(name) for name in names]
    chosen = default_weights(scores.metrics) if weights is None else weights
    found = combine(scores.values[:, places], chosen, scores.metrics, names)
    return found.masked_fill(~scores.exists.to(found.device), -torch.inf)


def said(row: Any, digits: int = 3) -> str:
    """A cost with its interval, for a sentence."""
    return f"{row['cost']:z.{digits}f} [{row['low']:z.{digits}f}, {row['high']:z.{digits}f}]"


def shown(frame: pd.DataFrame, label: str, measure: str, **about: Any) -> Any:
    """The one row of these values, or None."""
    here = frame[(frame["label"] == label) & (frame["measure"] == measure)]
    for name, value in about.items():
        here = here[here[name] == value]
    return here.iloc[0] if len(here) else None


def crossed(frame: pd.DataFrame, rows: str, measure: str) -> pd.DataFrame:
    """Mean costs: a row for each value of a column that is not empty, a column for each label."""
    here = frame[(frame["measure"] == measure) & (frame[rows] != "")]
    table = here.pivot(index=rows, columns="label", values="cost")
    table = table.loc[here[rows].unique(), here["label"].unique()]
    table.columns.name = "asked"
    return table


def _done(one: Condition) -> Any:
    """What a condition does to the model, whatever it is called."""
    if isinstance(one.neurons, NeuronSet) and not one.neurons and not one.complement:
        return None
    return type(one), one.neurons, one.value, one.at, one.complement
