"""What a report says of each kind of result: sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from miner_lens.experiments.card import NeuronCard
from miner_lens.experiments.flow import InformationFlow
from miner_lens.experiments.limits import limits
from miner_lens.experiments.patching import Patching
from miner_lens.experiments.result import Finding
from miner_lens.experiments.statistics import costs
from miner_lens.experiments.table import Trials
from miner_lens.models.result import Result
from miner_lens.reporting import plots
from miner_lens.scoring.sample_curves import SampleCurves
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.selection import Selection
from miner_lens.scoring.semantic_reach import SemanticReach

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTACT = "intact"
# The kind of what is only said.
TEXT = "text"


@dataclass(frozen=True, eq=False)
class Section:
    """What a report shows of one result.

    Attributes:
        name: Its heading.
        kind: The result's class.
        run: What was run: model, data, seeds, versions, as far as the result knows.
        sentences: What it says.
        tables: By caption.
        figures: By caption.
        html: What shows itself.
        limits: What the data behind it cannot say.
    """

    name: str
    kind: str
    run: Mapping[str, str]
    sentences: list[str]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    html: str = ""
    limits: list[str] = field(default_factory=list)


def section(name: str, result: Any) -> Section:
    """What a report shows of a result.

    Raises:
        TypeError: It is no result, table or figure.
    """
    run = dict(_run(result))
    kind, left_open = type(result).__name__, limits(result)
    if isinstance(result, NeuronCard):
        figures = {"scores by modality": result.figure()}
        html = result._repr_html_()
        return Section(name, kind, run, [result.summary], {}, figures, html, left_open)
    if isinstance(result, Finding):
        tables, figures = {kind: result.frame}, {kind: result.figure()}
        return Section(name, kind, run, [result.summary], tables, figures, limits=left_open)
    if isinstance(result, Trials):
        return _of_trials(name, run, result, left_open)
    if isinstance(result, Result):
        said = [_said(result)]
        tables, figures = {"overview": _indexed(result.overview())}, {}
        if isinstance(result, Selection) and result:
            figures = {"neurons by layer": plots.neurons_by_layer(result)}
        if isinstance(result, SampleCurves | InformationFlow | Patching | SemanticReach):
            curves = result.curves()
            tables |= {"curves": curves}
            figures = dict(_curves(curves))
        return Section(name, kind, run, said, tables, figures, limits=left_open)
    if isinstance(result, str):
        return Section(name, TEXT, run, result.splitlines())
    if isinstance(result, pd.DataFrame):
        return Section(name, "table", run, [], {f"{len(result)} rows": _indexed(result)})
    if hasattr(result, "savefig"):
        return Section(name, "figure", run, [], {}, {name: result})
    raise TypeError(
        f"{name} is a {kind}, which a report cannot show: give results of miner-lens, tables of "
        "pandas or figures of matplotlib."
    )


def _said(result: Result) -> str:
    """One sentence of what a result is."""
    if isinstance(result, ImportanceScores):
        with_it = zip(result.modalities, result.occurrences, strict=True)
        counts = ", ".join(f"{modality} in {count}" for modality, count in with_it if count)
        return (
            f"{', '.join(result.metrics)} of {result.layers} x {result.neurons} neurons, from "
            f"{result.samples} samples: {counts}."
        )
    if isinstance(result, Selection) and result:
        first = next(iter(result.values()))
        counts = ", ".join(f"{len(chosen)} of {name}" for name, chosen in result.items())
        return f"Of {first.layers} x {first.neurons} neurons, {counts}."
    return repr(result).partition("\n")[0]


def _of_trials(name: str, run: Mapping[str, str], table: Trials, left_open: list[str]) -> Section:
    tables: dict[str, pd.DataFrame] = {"overview": _indexed(table.overview())}
    figures: dict[str, Figure] = {}
    said = [f"{len(table.samples)} samples under {len(table.conditions)} conditions."]
    frame = table.to_frame()
    sizes = frame.groupby("label", dropna=False)["sample"].transform("nunique")
    if INTACT in table.conditions and len(table.conditions) > 1 and (sizes > 1).all():
        lost = costs(frame)
        lost = lost[lost["condition"] != INTACT].reset_index(drop=True)
        tables["costs, intact minus condition, with 95 % intervals"] = lost
        figures = {f"cost of {one}": plots.costs(lost, one) for one in ("correct", "logprob")}
        said += _most(lost)
    return Section(name, "Trials", run, said, tables, figures, limits=left_open)


def _most(lost: pd.DataFrame) -> Iterator[str]:
    """The condition that costs most, under each label."""
    rows = lost[lost["measure"] == "correct"]
    for label, group in rows.groupby("label", sort=False, dropna=False):
        row = group.sort_values("cost").iloc[-1]
        named = str(label)
        under = "" if pd.isna(label) else f"Under label {named}, "
        if row["cost"] <= 0:
            none = f"{under}no condition costs any accuracy, on {row['samples']} samples."
            yield none[0].upper() + none[1:]
            continue
        yield (
            f"{under}{row['condition']} costs most: {row['cost']:z.3f} [{row['low']:z.3f}, "
            f"{row['high']:z.3f}] of the accuracy, on {row['samples']} samples."
        )


def _curves(table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    by = "modality"
    if "label" in table and table["label"].nunique() > 1:
        by = "line"
        table = table.assign(line=table["modality"] + ", asked: " + table["label"])
    measures = table["measure"].unique() if "measure" in table else ["share restored"]
    for measure in measures:
        yield str(measure), plots.curves(table, str(measure), by=by)


def _indexed(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose index is a column, where it says something."""
    return table if isinstance(table.index, pd.RangeIndex) else table.reset_index()


def _listed(one: Any) -> str:
    return ", ".join(map(str, one)) if isinstance(one, list | tuple) else str(one)


def _run(result: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(result, Result | Finding | Trials):
        return
    info: Mapping[str, Any] = getattr(result, "info", {})
    identity = getattr(result, "identity", None)
    known = info.get("identity") if identity is None else identity.to_dict()
    if known:
        yield "model", str(known["name"])
    for name in ("data", "attention", "seed", "seeds"):
        if info.get(name) is not None:
            yield name, _listed(info[name])
    if isinstance(result, Trials) and (labels := [one for one in set(result.labels) if one]):
        yield "data", _listed(sorted(labels))
    samples = info.get("samples", getattr(result, "samples", None))
    if samples is not None:
        yield "samples", str(samples if isinstance(samples, int) else len(samples))
    if known:
        yield "architecture", f"{known['architecture']}, {known['layers']} x {known['neurons']}"
        if known.get("fingerprint"):
            yield "weights", str(known["fingerprint"])
    found = info.get("versions")
    if isinstance(found, Mapping):
        yield "versions", ", ".join(f"{name} {version}" for name, version in found.items())
