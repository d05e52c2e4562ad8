"""The main job on the model organisms: mine, select, switch off, compare with random neurons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import track
from rich.table import Table

from miner_lens.analyzers.importance import mine
from miner_lens.data import datasets
from miner_lens.experiments.evaluation import Questions, accuracy, render
from miner_lens.models.loading import load
from miner_lens.neurons.ablation import ablate
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.report import plots
from miner_lens.scoring.scores import ImportanceScores

RATIOS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
SHOWN_RATIO = 0.02
SEEDS = (0, 1, 2)
ANSWER_TOKENS = 4


@dataclass(frozen=True)
class Organism:
    """What the demo asks a model organism.

    Attributes:
        data: Its data set.
        inputs: The input modalities in which each question can be asked.
    """

    data: str
    inputs: tuple[str, ...]


ORGANISMS = {
    "shapes": Organism("easy-vqa", ("image", "text")),
    "speech": Organism("spoken-scenes", ("audio", "text")),
}


@dataclass(frozen=True)
class Condition:
    """Something to switch off: one set of neurons, or several random ones of the same size.

    Attributes:
        off: What the tables call it.
        ratio: The ratio at which it was selected.
        sets: The sets whose accuracies are averaged.
    """

    off: str
    ratio: float
    sets: tuple[NeuronSet, ...]


def run_demo(
    organism: str, out: Path, samples: int = 200, console: Console | None = None
) -> pd.DataFrame:
    """Mine an organism on its data set's test split and switch its neurons off.

    Args:
        organism: `"shapes"` or `"speech"`.
        out: Folder for scores, neuron sets, the table (CSV) and two figures; made if needed.
        samples: How many questions to ask in each input modality.
        console: Where to print; default the terminal.

    Returns:
        One row for each input modality and condition: `input`, `off`, `ratio`, `neurons`,
        `accuracy` (over seeds: their mean), `spread` (their standard deviation), `samples`.

    Raises:
        ValueError: There is no such organism.
    """
    if organism not in ORGANISMS:
        raise ValueError(f"There is no organism {organism!r}; there are {', '.join(ORGANISMS)}.")
    setting = ORGANISMS[organism]
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    model = load(organism, device="cpu")
    data = {ask: datasets.load(setting.data, limit=samples, ask=ask) for ask in setting.inputs}

    console.print(f"Mining [bold]{organism}[/] over {samples} questions in each input modality")
    scores = ImportanceScores.mean([mine(model, some, batch_size=16) for some in data.values()])
    scores.save(out / "scores.safetensors")
    chosen = scores.select(SHOWN_RATIO)
    for modality, neurons in chosen.items():
        neurons.save(out / f"neurons-{modality}.safetensors")

    questions = {ask: list(render(model, some, batch_size=50)) for ask, some in data.items()}
    table = _measure(model, scores, questions, console)
    table.to_csv(out / "accuracy.csv", index=False)
    plots.accuracy_by_ratio(table).savefig(out / "accuracy.png")
    plots.neurons_by_layer(chosen).savefig(out / "neurons.png")
    _report(console, table, chosen, out)
    return table


def conditions(scores: ImportanceScores, ratio: float) -> Iterator[Condition]:
    """Each modality's MSNs, all of them, and random neurons as many as each of the two."""
    chosen = scores.select(ratio)
    everything = NeuronSet.union(chosen.values())
    for modality, neurons in chosen.items():
        yield Condition(modality, ratio, (neurons,))
    yield Condition("all MSNs", ratio, (everything,))
    one = next(iter(chosen.values()))
    for name, like in (("random, as one modality", one), ("random, as all MSNs", everything)):
        sets = tuple(NeuronSet.random(len(like), like=like, seed=seed) for seed in SEEDS)
        yield Condition(name, ratio, sets)


def _measure(
    model: Any,
    scores: ImportanceScores,
    questions: dict[str, list[Questions]],
    console: Console,
) -> pd.DataFrame:
    rows = []
    for ask, rendered in questions.items():
        intact = accuracy(model, rendered, max_new_tokens=ANSWER_TOKENS)
        rows.append(_row(ask, "nothing", None, 0, [intact], rendered))
    plan = [condition for ratio in RATIOS for condition in conditions(scores, ratio)]
    for condition in track(plan, description="Switching off", console=console):
        for ask, rendered in questions.items():
            measured = []
            for neurons in condition.sets:
                with ablate(model, neurons):
                    measured.append(accuracy(model, rendered, max_new_tokens=ANSWER_TOKENS))
            size = round(mean(map(len, condition.sets)))
            rows.append(_row(ask, condition.off, condition.ratio, size, measured, rendered))
    return pd.DataFrame(rows)


def _row(
    ask: str,
    off: str,
    ratio: float | None,
    neurons: int,
    measured: list[float],
    rendered: list[Questions],
) -> dict[str, Any]:
    return {
        "input": ask,
        "off": off,
        "ratio": ratio,
        "neurons": neurons,
        "accuracy": mean(measured),
        "spread": stdev(measured) if len(measured) > 1 else None,
        "samples": sum(len(questions.samples) for questions in rendered),
    }


def _report(console: Console, table: pd.DataFrame, chosen: dict[str, NeuronSet], out: Path) -> None:
    for ratio in RATIOS:
        rows = table[table["ratio"].isna() | (table["ratio"] == ratio)]
        console.print(_accuracies(rows, ratio))
    for ask in table["input"].unique():
        for finding in _findings(table, ask):
            console.print(finding)
    sizes = ", ".join(f"{len(neurons)} {modality}" for modality, neurons in chosen.items())
    console.print(f"Selected at {SHOWN_RATIO:.0%}: {sizes} neurons. Saved in {out}/.")


def _accuracies(rows: pd.DataFrame, ratio: float) -> Table:
    shown = Table(title=f"Accuracy with {ratio:.1%} of the neurons selected")
    shown.add_column("switched off")
    shown.add_column("neurons", justify="right")
    inputs = rows["input"].unique()
    for ask in inputs:
        shown.add_column(f"from the {ask}", justify="right")
    for off, group in rows.groupby("off", sort=False):
        cells = []
        for ask in inputs:
            row = group[group["input"] == ask].iloc[0]
            spread = "" if pd.isna(row["spread"]) else f" ± {row['spread']:.3f}"
            cells.append(f"{row['accuracy']:.3f}{spread}")
        shown.add_row(str(off), str(group["neurons"].iloc[0]), *cells)
    return shown


def _findings(table: pd.DataFrame, ask: str) -> Iterator[str]:
    """What the modality's own neurons do, and which set does most, beside random ones."""
    rows: Any = table[table["input"] == ask].set_index("off")
    intact = float(rows.loc["nothing", "accuracy"])
    chosen = rows.drop("nothing")
    own = chosen[chosen["ratio"] == SHOWN_RATIO].loc[ask]
    yield f"Asked about the {ask}, {_beside_chance(chosen, own, intact)}"
    specific = chosen[chosen["spread"].isna()]
    most = specific.iloc[specific["accuracy"].argmin()]
    yield f"The most that any set does to it: {_beside_chance(chosen, most, intact)}"


def _beside_chance(chosen: Any, row: Any, intact: float) -> str:
    all_of_them = row.name == "all MSNs"
    neurons = f"all {row['neurons']} MSNs" if all_of_them else f"{row['neurons']} {row.name} MSNs"
    like = "all MSNs" if all_of_them else "one modality"
    random = chosen[chosen["ratio"] == row["ratio"]].loc[f"random, as {like}"]
    cost, chance = intact - row["accuracy"], intact - random["accuracy"]
    beyond = "more than" if cost > chance + 2 * random["spread"] else "no more than"
    return (
        f"switching off {neurons} at {row['ratio']:.1%} costs {cost:.3f} accuracy; as many random "
        f"neurons cost {chance:.3f} ± {random['spread']:.3f}: {beyond} chance."
    )
