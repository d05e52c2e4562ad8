"""A trained organism, its questions, and the neurons that the parts of its page share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

import miner_lens as ml
from miner_lens.data.spoken_scenes import spoken_scenes
from miner_lens.experiments.plan import Ablation, Data, Options, Plan
from miner_lens.experiments.table import Trials

BATCH = 16
# What espeak-ng calls its English voices begins with the accent.
ACCENTS = {"scottish": "en-gb-scotland", "american": "en-us", "caribbean": "en-029"}
RATIO = 0.02
# How many questions through each modality are tried in parts with many conditions.
FEWER = {
    **dict.fromkeys(("compared", "grid", "needed", "tuned", "flow"), 16),
    "transfer": 24,
    **dict.fromkeys(("values", "lens", "texts", "voices"), 12),
}


@dataclass(frozen=True)
class Subject:
    """What an organism is asked.

    Attributes:
        data: Its data set.
        inputs: In which modalities each question is asked, the medium first.
        sets: Data sets that it was trained on, and what is asked about.
        without: Parts of the page that it has no data for.
        mixed: Ways to ask through several modalities, tried beside the controls.
        fewer: How many questions are tried in parts that would take long.
    """

    data: str
    inputs: tuple[str, ...]
    sets: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    fewer: Mapping[str, int] = field(default_factory=dict)


SUBJECTS = {
    "smol-vl": Subject(
        "easy-vqa", ("image", "text"), (("easy-vqa", "image"), ("digits", "image")), ("voices",)
    ),
    "smol-audio": Subject(
        "spoken-scenes",
        ("audio", "text"),
        without=("domains",),
        fewer={
            "transfer": 12,
            **dict.fromkeys(("specific", "values"), 12),
            **dict.fromkeys(("ratios", "grid", "needed", "tuned", "texts"), 8),
            **dict.fromkeys(("compared", "lens", "flow", "voices"), 6),
        },
    ),
    "smol-omni": Subject(
        "easy-vqa",
        ("image", "audio", "text"),
        without=("domains", "transfer", "voices"),
        mixed=("voice",),
        fewer=dict.fromkeys(("specific",), 12),
    ),
    "shapes": Subject("easy-vqa", ("image", "text"), without=("domains", "transfer", "voices")),
}


class Lab:
    """An organism, its questions, and the neurons that the parts share.

    Args:
        name: The organism.
        mined: How many questions through each modality are mined.
        tried: How many others are tried.
        figures: Folder for figures.
        work: Folder for scores and trials that are done.
    """

    def __init__(self, name: str, mined: int, tried: int, figures: Path, work: Path) -> None:
        self.name, self.subject = name, SUBJECTS[name]
        self.figures, self.work = figures, work
        self.mined_count, self.tried_count = mined, tried
        every = {
            ask: ml.datasets.load(self.subject.data, limit=mined + tried, ask=ask)
            for ask in (*self.subject.inputs, *self.subject.mixed)
        }
        inputs, mixed = self.subject.inputs, self.subject.mixed
        self.mined = {ask: every[ask][:mined] for ask in inputs}
        self.tried = {ask: every[ask][mined:] for ask in inputs}
        self.mixed = {ask: every[ask][mined:] for ask in mixed}

    @cached_property
    def model(self) -> Any:
        """The organism."""
        return ml.load(self.name, device="cpu")

    @cached_property
    def scores(self) -> ml.ImportanceScores:
        """MINER's scores."""
        return self._mean("scores", lambda some: ml.mine(self.model, some, batch_size=BATCH))

    @cached_property
    def attribution(self) -> ml.ImportanceScores:
        """The first-order effect of switching off."""
        return self._mean("attribution", lambda some: ml.attribute(self.model, some, batch_size=8))

    @cached_property
    def contribution(self) -> ml.ImportanceScores:
        """What neurons write towards the answer."""

        def scored(some: Any) -> ml.ImportanceScores:
            found: ml.ImportanceScores = ml.run(
                self.model, some, ml.ContributionAnalyzer(), batch_size=BATCH
            )
            return found

        return self._mean("contribution", scored)

    def questions(self, part: str) -> int:
        """How many questions through each modality (or of each domain) a part tries."""
        return min(self.tried_count, {**FEWER, **self.subject.fewer}.get(part, self.tried_count))

    def asked(self, part: str) -> dict[str, Any]:
        """By input modality, the questions that a part tries."""
        return {ask: some[: self.questions(part)] for ask, some in self.tried.items()}

    def options(self, part: str) -> Options:
        """How trials are made; those that are done are kept, so that they can be read again."""
        return {"batch_size": BATCH, "metric": "begins", "checkpoint": self.work / "trials" / part}

    def together(
        self, part: str, plans: Mapping[str, Plan], data: Data
    ) -> tuple[Trials, dict[str, Plan]]:
        """Several plans tried in one table; what they share is tried once.

        Returns:
            The table, and the plans, their conditions named as in the table.
        """
        known = {
            name: [_named(row, f"{name}: {row.name}") for row in plan.rows]
            for name, plan in plans.items()
        }
        whole = Plan(tuple(row for rows in known.values() for row in rows))
        table = whole.run(self.model, data, self.options(part))
        tried = {
            name: Plan(tuple(_named(row, row.name, whole.groups[row.name]) for row in rows))
            for name, rows in known.items()
        }
        return table, tried

    def picture(self, figure: Any, part: str) -> str:
        """The Markdown of a figure, which is saved."""
        self.figures.mkdir(parents=True, exist_ok=True)
        file = self.figures / f"{self.name}-{part}.png"
        figure.savefig(file, dpi=80, bbox_inches="tight")
        return f"![{part}](../images/{file.name})"

    def _mean(self, name: str, score: Callable[[Any], ml.ImportanceScores]) -> ml.ImportanceScores:
        """Scores of each input modality's questions, averaged; kept."""
        file = self.work / f"{name}-{self.mined_count}.safetensors"
        if not file.exists():
            found = ml.ImportanceScores.mean([score(some) for some in self.mined.values()])
            file.parent.mkdir(parents=True, exist_ok=True)
            found.save(file)
        return ml.ImportanceScores.load(file)


def by_accent() -> dict[str, list[ml.Sample]]:
    """Spoken scenes by the accent of the voice."""
    spoken = spoken_scenes(label="voice")
    return {
        accent: [sample for sample in spoken if str(sample.label).startswith(prefix)]
        for accent, prefix in ACCENTS.items()
    }


def shown_as(result: Any) -> str:
    """What a result prints, as Markdown leaves it."""
    return f"```\n{result!r}\n```"


def markdown(frame: pd.DataFrame, digits: int = 3) -> str:
    """A table in Markdown, with fixed digits; what is missing is left empty."""
    shown = frame.copy()
    for name, column in shown.items():
        if pd.api.types.is_float_dtype(column):
            shown[name] = ["" if pd.isna(one) else f"{one:z.{digits}f}" for one in column]
    return str(shown.to_markdown(index=False, disable_numparse=True))


def spans(frame: pd.DataFrame, value: str, name: str, digits: int = 3) -> pd.DataFrame:
    """A table whose columns value, low and high are one, `value [low, high]`."""
    said = [
        f"{getattr(row, value):z.{digits}f} [{row.low:z.{digits}f}, {row.high:z.{digits}f}]"
        for row in frame.itertuples()
    ]
    return frame.drop(columns=[value, "low", "high"]).assign(**{name: said})


def costs(frame: pd.DataFrame, about: Sequence[str]) -> str:
    """Costs by row and input, with their intervals, as a Markdown table."""
    shown = spans(frame[[*about, "label", "measure", "cost", "low", "high"]], "cost", "cost")
    intact = frame[(frame["cost"] == 0) & (frame["neurons"] == 0)].drop_duplicates(
        ["label", "measure"]
    )
    said = "; ".join(
        f"{row.measure} about the {row.label}: {row.value:.3f}" for row in intact.itertuples()
    )
    rows = shown[frame["neurons"] > 0]
    wide = rows.pivot_table("cost", about, ["label", "measure"], "first", sort=False)
    wide.columns = [f"{measure}, asked about the {label}" for label, measure in [*wide.columns]]
    before = f"Intact, {said}. " if said else ""
    return f"{before}What is lost:\n\n{wide.reset_index().to_markdown(index=False)}"


def _named(row: Ablation, name: str, tried: Iterable[str] = ()) -> Ablation:
    """A row of a name, its conditions named after it or as they were tried."""
    names = list(tried) or [f"{name}, {one.name}" for one in row.conditions]
    pairs = zip(row.conditions, names, strict=True)
    return replace(row, name=name, conditions=tuple(replace(one, name=n) for one, n in pairs))
