"""The main job on the model organisms: are their modality-specific neurons specific?

Mine, select, switch off, and hold the costs against those of random neurons and of another input.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from rich.console import Console

from miner_lens.analyzers.importance import mine
from miner_lens.data import datasets
from miner_lens.experiments import statistics
from miner_lens.experiments.condition import Condition
from miner_lens.experiments.statistics import Comparison
from miner_lens.experiments.trials import trials
from miner_lens.models.loading import load
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.reporting import findings, plots, report
from miner_lens.scoring.scores import ImportanceScores

RATIOS = (0.001, 0.005, 0.01, 0.02, 0.05)
SHOWN_RATIO = 0.02
SEEDS = (0, 1, 2)
LEFT_OUT = (
    "Left out to save time: at ratios other than {shown:.1%}, all but one seed of the controls, "
    "and the controls of single modalities."
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
    "shapes": Organism("easy-vqa", ("image", "text")),
    "speech": Organism("spoken-scenes", ("audio", "text")),
}


@dataclass(frozen=True)
class Ablation:
    """A set of neurons to switch off, or a control: several random ones, a condition for each.

    Attributes:
        off: What tables call it.
        ratio: The ratio at which it was selected.
        sets: The set, or one for each seed.
    """

    off: str
    ratio: float
    sets: tuple[NeuronSet, ...]

    @property
    def name(self) -> str:
        """What the conditions' names begin with."""
        return named(self.off, self.ratio)

    @property
    def conditions(self) -> list[Condition]:
        """A condition for each set."""
        if len(self.sets) == 1:
            return [Condition(self.name, self.sets[0])]
        return [Condition(f"{self.name}, seed {n}", one) for n, one in enumerate(self.sets)]


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

    plans = {ask: list(plan(scores, ask)) for ask in data}
    console.print(LEFT_OUT.format(shown=SHOWN_RATIO))
    tried, ended = {}, []
    for ask, some in data.items():
        conditions = [one for ablation in plans[ask] for one in ablation.conditions]
        labelled = [replace(sample, label=ask) for sample in some]
        intact = Condition("intact")
        tried[ask] = trials(model, labelled, [intact, *conditions], metric="begins")
        msns = [one for one in conditions if one.name.endswith(named("MSNs", SHOWN_RATIO))]
        ended.append(trials(model, labelled, [intact, *msns]).to_frame())
    begun_right = [table.to_frame() for table in tried.values()]
    tables = [pd.concat(each, ignore_index=True) for each in (begun_right, ended)]
    results = Results.of(tables[0], tables[1], plans)
    results.save(out)
    plots.neurons_by_layer(chosen).savefig(out / "neurons.png")
    for ask in data:
        console.print(findings.cost_table(results.summary, ask))
    for sentence in results.findings():
        console.print(sentence)
    shown = {
        "scores": scores,
        "neurons": chosen,
        **{f"asked about the {ask}": table for ask, table in tried.items()},
        "costs": results.summary,
        "beside controls": results.controls,
        "specificity": results.specificity,
    }
    page = report(shown, out / "report.html", f"miner-lens demo on {organism}")
    took = time.perf_counter() - begun
    console.print(f"That took {took:.0f} s. Tables, figures and neurons are in {out}/.")
    console.print(f"The report is {page}: open it in a browser.", soft_wrap=True)
    return results.summary


def plan(scores: ImportanceScores, ask: str) -> Iterator[Ablation]:
    """What is switched off for the questions in one input modality."""
    total = scores.layers * scores.neurons
    for ratio in RATIOS:
        if int(ratio * total) < len(scores.select(SHOWN_RATIO)):
            continue  # less than one neuron of each modality, in a small model
        shown = ratio == SHOWN_RATIO
        seeds = SEEDS if shown else SEEDS[:1]
        chosen = scores.select(ratio)
        everything = NeuronSet.union(chosen)
        for modality, neurons in chosen.items():
            yield Ablation(f"{modality} MSNs", ratio, (neurons,))
        yield Ablation("all MSNs", ratio, (everything,))
        yield Ablation("random, as all", ratio, _random(everything, seeds))
        yield Ablation("layer-matched, as all", ratio, _matched(everything, seeds))
        if shown:
            yield Ablation(f"layer-matched, as {ask}", ratio, _matched(chosen[ask], seeds))


def _random(like: NeuronSet, seeds: tuple[int, ...]) -> tuple[NeuronSet, ...]:
    return tuple(NeuronSet.random(len(like), like=like, seed=seed) for seed in seeds)


def _matched(like: NeuronSet, seeds: tuple[int, ...]) -> tuple[NeuronSet, ...]:
    return tuple(NeuronSet.random_like(like, seed=seed) for seed in seeds)


@dataclass(frozen=True)
class Results:
    """The table of trials and what it says.

    Attributes:
        trials: One row for each question and condition; an answer is right that begins so.
        ended: The same of the shown MSNs, where a right answer also ends there.
        summary: As `run_demo` returns it.
        controls: MSNs beside their controls, all in one family.
        specificity: Each input's own MSNs, in questions in it and in the other input.
    """

    trials: pd.DataFrame
    ended: pd.DataFrame
    summary: pd.DataFrame
    controls: pd.DataFrame
    specificity: pd.DataFrame

    @classmethod
    def of(
        cls, tried: pd.DataFrame, ended: pd.DataFrame, plans: Mapping[str, list[Ablation]]
    ) -> Results:
        """What the trials of these plans say."""
        own = {named(f"{ask} MSNs", SHOWN_RATIO): ask for ask in plans}
        return cls(
            tried,
            ended,
            _summary(tried, plans),
            statistics.against_controls(tried, _comparisons(plans)),
            statistics.specificity(tried, own, lambda sample: sample.rpartition("/")[0]),
        )

    def save(self, out: Path) -> None:
        """Write the tables and the figures of costs."""
        self.trials.to_csv(out / "trials.csv.gz", index=False)
        self.ended.to_csv(out / "ended.csv.gz", index=False)
        for name in ("summary", "controls", "specificity"):
            getattr(self, name).to_csv(out / f"{name}.csv", index=False)
        for name, lines in _lines(self.summary):
            plots.by_ratio(lines, name).savefig(out / f"{name.split()[0]}.png")

    def findings(self) -> Iterator[str]:
        """Sentences on the shown ratio."""
        shown = named("", SHOWN_RATIO)
        of_it = self.controls[self.controls["condition"].str.endswith(shown)]
        yield from findings.beside_controls(of_it, len(self.controls))
        yield from findings.specificity(self.specificity)
        yield from findings.endings(self.trials, self.ended)


def _summary(tried: pd.DataFrame, plans: Mapping[str, list[Ablation]]) -> pd.DataFrame:
    """Costs of each ablation, controls averaged over their seeds."""
    tables = []
    for ask, ablations in plans.items():
        groups = {one.name: [condition.name for condition in one.conditions] for one in ablations}
        here = tried[tried["label"] == ask]
        found = statistics.costs(statistics.averaged(here, {"intact": ["intact"], **groups}))
        about = pd.DataFrame(
            [(one.name, one.off, one.ratio, len(one.sets[0]), len(one.sets)) for one in ablations],
            columns=["condition", "off", "ratio", "neurons", "seeds"],
        )
        tables.append(found.merge(about, on="condition", how="left"))
    table = pd.concat(tables, ignore_index=True).rename(columns={"label": "input"})
    table["off"] = table["off"].fillna("nothing")
    table["neurons"] = table["neurons"].fillna(0).astype(int)
    first = ["input", "off", "ratio", "neurons", "seeds", "measure"]
    return table[[*first, "samples", "value", "cost", "low", "high"]]


def _comparisons(plans: Mapping[str, list[Ablation]]) -> list[Comparison]:
    """All MSNs beside both controls at each ratio, and an input's own MSNs at the shown one."""
    found = {}
    for one in (ablation for ablations in plans.values() for ablation in ablations):
        kind, _, like = one.off.partition(", as ")
        if like:
            condition = named(f"{like} MSNs", one.ratio)
            controls = [control.name for control in one.conditions]
            found[one.name] = Comparison(condition, kind, controls)
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
