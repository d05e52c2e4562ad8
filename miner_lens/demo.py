"""The main job on the model organisms: are their modality-specific neurons specific?

Mine, select, switch off, and hold the costs against those of random neurons and of another input.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console

from miner_lens.analyzers.importance import mine
from miner_lens.data import datasets
from miner_lens.experiments import statistics
from miner_lens.experiments.first_cards import first_cards
from miner_lens.experiments.plan import Ablation, Plan, Sets
from miner_lens.experiments.statistics import Comparison
from miner_lens.experiments.table import Trials
from miner_lens.experiments.trials import trials
from miner_lens.models.loading import load
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.reporting import findings, plots, report
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIOS = (0.001, 0.005, 0.01, 0.02, 0.05)
SHOWN_RATIO = 0.02
SEEDS = (0, 1, 2)
LEFT_OUT = (
    "Random neurons are drawn by seeds {seeds}. Left out to save time: at ratios other than "
    "{shown:.1%}, all but the first of them, and the controls of single modalities."
)


@dataclass(frozen=True)
class Organism:
    """What the demo asks a model organism.

    Attributes:
        data: Its data set.
        inputs: The input modalities in which each question can be asked, the medium first.
    """

    data: str
    inputs: tuple[str, ...]


ORGANISMS = {
    "smol-vl": Organism("easy-vqa", ("image", "text")),
    "smol-audio": Organism("spoken-scenes", ("audio", "text")),
    "smol-omni": Organism("easy-vqa", ("image", "audio", "text")),
    "shapes": Organism("easy-vqa", ("image", "text")),
    "speech": Organism("spoken-scenes", ("audio", "text")),
}


def named(off: str, ratio: float) -> str:
    """A condition's name in the table of trials."""
    return f"{off} at {ratio:.1%}"


def run_demo(
    organism: str, out: Path, samples: int = 40, console: Console | None = None
) -> pd.DataFrame:
    """Mine an organism on its data set's test split, switch neurons off, say what that shows.

    Args:
        organism: One of `ORGANISMS`.
        out: Folder for scores, neuron sets, tables, figures and `report.html`; made if needed.
            `trials.csv.gz` has a row for each question and condition (`correct`: the answer begins
            right), and `ended.csv.gz` one for those at the shown ratio (`correct`: it also ends
            there).
            `summary.csv`, `controls.csv` and `specificity.csv` are what `experiments.statistics`
            makes of the former.
        samples: How many questions to ask in each input modality.
        console: Where to print; default the terminal.

    Returns:
        The summary, one row for each input modality, ablation and measure: `input`, `off`, `ratio`,
        `neurons`, `seeds`, and what `statistics.costs` says, for a control of its mean over seeds.

    Raises:
        ValueError: There is no such organism, or fewer than two samples.
    """
    if organism not in ORGANISMS:
        raise ValueError(f"There is no organism {organism!r}; there are {', '.join(ORGANISMS)}.")
    if samples < 2:
        raise ValueError(f"Intervals need at least two samples, not {samples}.")
    setting = ORGANISMS[organism]
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    model = load(organism, device="cpu")
    data = {ask: datasets.load(setting.data, limit=samples, ask=ask) for ask in setting.inputs}

    console.print(f"Mining [bold]{organism}[/] over {samples} questions in each input modality")
    scores = ImportanceScores.mean([mine(model, some, batch_size=16) for some in data.values()])
    scores.save(out / "scores.safetensors")
    chosen = scores.select(SHOWN_RATIO)
    for modality, neurons in chosen.items():
        neurons.save(out / f"neurons-{modality}.safetensors")

    plans = {ask: plan(scores, ask) for ask in data}
    left_out = LEFT_OUT.format(shown=SHOWN_RATIO, seeds=", ".join(map(str, SEEDS)))
    console.print(left_out)
    tried, ended = {}, []
    for ask, some in data.items():
        conditions = plans[ask].conditions
        tried[ask] = trials(model, {ask: some}, conditions, metric="begins")
        msns = [one for one in conditions if one.name.endswith(named("MSNs", SHOWN_RATIO))]
        ended.append(trials(model, {ask: some}, [conditions[0], *msns]))
    cards = first_cards(model, data, scores, data, batch_size=16, progress=False)
    results = Results.of(tried, ended, plans)
    results.save(out)
    plots.neurons_by_layer(chosen).savefig(out / "neurons.png")
    for ask in data:
        console.print(findings.cost_table(results.summary, ask))
    for sentence in results.findings():
        console.print(sentence)
    shown = {
        "what it says": "\n".join([*results.findings(), left_out]),
        **{f"{name} by ratio": figure for name, figure in results.figures()},
        "costs": results.summary,
        "beside controls": results.controls,
        "specificity": results.specificity,
        "scores": scores,
        "neurons": chosen,
        **{f"first {ask} neuron": one for ask, one in cards.items()},
        **{f"asked about the {ask}": table for ask, table in tried.items()},
    }
    page = report(shown, out / "report.html", f"miner-lens demo on {organism}")
    took = time.perf_counter() - begun
    console.print(f"That took {took:.0f} s. Tables, figures and neurons are in {out}/.")
    console.print(f"The report is {page}: open it in a browser.", soft_wrap=True)
    return results.summary


def plan(scores: ImportanceScores, ask: str) -> Plan:
    """What is switched off for the questions in one input modality."""
    return Plan(tuple(_rows(scores, ask)))


def _rows(scores: ImportanceScores, ask: str) -> Iterator[Ablation]:
    for ratio in RATIOS:
        if int(ratio * scores.total) < len(scores.select(SHOWN_RATIO)):
            continue  # less than one neuron of each modality, in a small model
        shown = ratio == SHOWN_RATIO
        chosen = scores.select(ratio)
        everything = NeuronSet.union(chosen)
        sets: dict[str, Sets] = {f"{modality} MSNs": one for modality, one in chosen.items()}
        sets["all MSNs"] = everything
        sets["random, as all"] = [
            NeuronSet.random(len(everything), like=everything, seed=seed) for seed in SEEDS
        ]
        sets["layer-matched, as all"] = _matched(everything)
        if shown:
            sets[f"layer-matched, as {ask}"] = _matched(chosen[ask])
        for off, one in sets.items():
            some = one if shown or isinstance(one, NeuronSet) else one[0]
            yield Ablation.of(named(off, ratio), some, {"off": off, "ratio": ratio})


def _matched(like: NeuronSet) -> list[NeuronSet]:
    return [NeuronSet.random_like(like, seed=seed) for seed in SEEDS]


@dataclass(frozen=True)
class Results:
    """The table of trials and what it says.

    Attributes:
        trials: One row for each question and condition; an answer is right that begins so.
        ended: The same of the shown MSNs, where a right answer also ends there.
        summary: As `run_demo` returns it.
        controls: MSNs beside their controls, all in one family.
        specificity: Each input's own MSNs, in questions in it and in each other input.
    """

    trials: pd.DataFrame
    ended: pd.DataFrame
    summary: pd.DataFrame
    controls: pd.DataFrame
    specificity: pd.DataFrame

    @classmethod
    def of(
        cls, tried: Mapping[str, Trials], ended: Sequence[Trials], plans: Mapping[str, Plan]
    ) -> Results:
        """What the trials of these plans say."""
        begun = pd.concat([table.to_frame() for table in tried.values()], ignore_index=True)
        own = {named(f"{ask} MSNs", SHOWN_RATIO): ask for ask in plans}
        return cls(
            begun,
            pd.concat([table.to_frame() for table in ended], ignore_index=True),
            pd.concat([_summary(tried[ask], plans[ask]) for ask in plans], ignore_index=True),
            statistics.against_controls(begun, _comparisons(plans)),
            statistics.specificity(begun, own, lambda sample: sample.rpartition("/")[0]),
        )

    def save(self, out: Path) -> None:
        """Write the tables and the figures of costs."""
        self.trials.to_csv(out / "trials.csv.gz", index=False)
        self.ended.to_csv(out / "ended.csv.gz", index=False)
        for name in ("summary", "controls", "specificity"):
            getattr(self, name).to_csv(out / f"{name}.csv", index=False)
        for name, figure in self.figures():
            figure.savefig(out / f"{name}.png")

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """What ablations cost, ratio by ratio."""
        for name, lines in _lines(self.summary):
            yield name.split()[0], plots.by_ratio(lines, name)

    def findings(self) -> Iterator[str]:
        """Sentences on the shown ratio."""
        shown = named("", SHOWN_RATIO)
        of_it = self.controls[self.controls["condition"].str.endswith(shown)]
        yield from findings.beside_controls(of_it, len(self.controls))
        yield from findings.specificity(self.specificity)
        yield from findings.endings(self.trials, self.ended)


def _summary(tried: Trials, plan: Plan) -> pd.DataFrame:
    """Costs of each ablation, controls averaged over their seeds."""
    table = plan.costs(tried).rename(columns={"label": "input"}).drop(columns="condition")
    intact = table["off"] == ""
    table["off"] = table["off"].mask(intact, "nothing")
    return table.assign(**{name: table[name].mask(intact) for name in ("ratio", "seeds")})


def _comparisons(plans: Mapping[str, Plan]) -> list[Comparison]:
    """All MSNs beside both controls at each ratio, and an input's own MSNs at the shown one."""
    found = {}
    for one in plans.values():
        for row in one.rows:
            kind, _, like = str(row.about["off"]).partition(", as ")
            if like:
                (condition,) = one.groups[named(f"{like} MSNs", row.about["ratio"])]
                found[row.name] = Comparison(condition, kind, one.groups[row.name])
    return list(found.values())


def _lines(summary: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """What is drawn of each measure: what was measured at every ratio, with its band."""
    ratios = summary["ratio"].nunique()
    along = summary.groupby(["input", "off", "measure"])["ratio"].transform("nunique")
    drawn = summary[(along == ratios) | (summary["off"] == "nothing")]
    correct = drawn[drawn["measure"] == "correct"]
    intact = correct["value"] + correct["cost"]
    band = {"low": intact - correct["high"], "high": intact - correct["low"]}
    yield "accuracy", correct.assign(**band)
    logprob = drawn[drawn["measure"] == "logprob"]
    yield "logprob lost (nats)", logprob.assign(value=logprob["cost"])
