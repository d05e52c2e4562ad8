"""What the experiments say on a trained organism, as docs/results has it.

`python -m benchmarks.organisms smol-vl` writes docs/results/smol-vl.md and its figures. A part
that is done is kept in `--work`, so that a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

import miner_lens as ml
from miner_lens.data.labelled import labelled

BATCH = 16
RATIO = 0.02


@dataclass(frozen=True)
class Subject:
    """What an organism is asked.

    Attributes:
        data: Its data set.
        inputs: In which modalities each question is asked, the medium first.
        domains: Data sets that are domains, and what is asked about.
    """

    data: str
    inputs: tuple[str, ...]
    domains: tuple[tuple[str, str], ...]


SUBJECTS = {
    "smol-vl": Subject("easy-vqa", ("image", "text"), (("easy-vqa", "image"), ("digits", "image"))),
    "smol-audio": Subject("spoken-scenes", ("audio", "text"), ()),
    "shapes": Subject("easy-vqa", ("image", "text"), ()),
}


class Lab:
    """An organism, its questions, and the neurons that the parts share.

    Args:
        name: The organism.
        mined: How many questions through each modality are mined.
        tried: How many others are tried.
        figures: Folder for figures.
    """

    def __init__(self, name: str, mined: int, tried: int, figures: Path) -> None:
        self.name, self.subject, self.figures = name, SUBJECTS[name], figures
        self.mined_count, self.tried_count = mined, tried
        every = {
            ask: ml.datasets.load(self.subject.data, limit=mined + tried, ask=ask)
            for ask in self.subject.inputs
        }
        self.mined = {ask: some[:mined] for ask, some in every.items()}
        self.tried = {ask: some[mined:] for ask, some in every.items()}

    @cached_property
    def model(self) -> Any:
        """The organism."""
        return ml.load(self.name, device="cpu")

    @cached_property
    def scores(self) -> ml.ImportanceScores:
        """MINER's scores."""
        each = [ml.mine(self.model, some, batch_size=BATCH) for some in self.mined.values()]
        return ml.ImportanceScores.mean(each)

    @cached_property
    def attribution(self) -> ml.ImportanceScores:
        """The first-order effect of switching off."""
        each = [ml.attribute(self.model, some, batch_size=8) for some in self.mined.values()]
        return ml.ImportanceScores.mean(each)

    def picture(self, finding: Any, part: str) -> str:
        """The Markdown of a finding's figure, which is saved."""
        self.figures.mkdir(parents=True, exist_ok=True)
        file = self.figures / f"{self.name}-{part}.png"
        finding.figure().savefig(file, dpi=80, bbox_inches="tight")
        return f"![{part}](../images/{file.name})"


def controls(lab: Lab) -> str:
    """All MSNs and each modality's, beside their controls."""
    found = ml.experiments.ablation_table(
        lab.model, lab.tried, lab.scores, RATIO, batch_size=BATCH, metric="begins"
    )
    return f"{found.summary}\n\n{costs(found.frame, ['off', 'kind', 'neurons'])}"


def ratios(lab: Lab) -> str:
    """What is lost by how many neurons."""
    found = ml.experiments.ratio_sweep(
        lab.model, lab.tried, lab.scores, seeds=[0], batch_size=BATCH, metric="begins"
    )
    shown = found.frame[found.frame["off"].isin(["all", "random"])]
    drawn = lab.picture(found, "ratios")
    return f"{found.summary}\n\n{drawn}\n\n{costs(shown, ['ratio', 'off', 'neurons'])}"


def specific(lab: Lab) -> str:
    """Which selection is most specific, at equal size."""
    rows, lines = [], []
    selections: list[tuple[str, ml.ImportanceScores, str]] = [
        (f"MINER, {name}", lab.scores, name)
        for name in ("LA_MU", "adaptive", "contrastive", "lape")
    ]
    selections.append(("attribution, LA_MU", lab.attribution, "LA_MU"))
    selections.append(("attribution, contrastive", lab.attribution, "contrastive"))
    for called, scores, strategy in selections:
        found = ml.experiments.specificity(
            lab.model, lab.tried, scores, RATIO, strategy, batch_size=BATCH, metric="begins"
        )
        matrix = found.matrix()
        for measure, row in found.index.set_index("measure").iterrows():
            sizes = found.frame[found.frame["off"].isin(lab.subject.inputs)]["neurons"].unique()
            rows.append(
                {
                    "selection": called,
                    "neurons each": " to ".join(str(n) for n in sorted({min(sizes), max(sizes)})),
                    "measure": measure,
                    "own": f"{row['own']:z.3f}",
                    "other": f"{row['other']:z.3f}",
                    "index": f"{row['index']:z.2f} [{row['low']:z.2f}, {row['high']:z.2f}]",
                }
            )
        lines += [
            {
                "selection": called,
                "off": off,
                **{f"asked about the {ask}": f"{lost:z.3f}" for ask, lost in line.items()},
            }
            for off, line in matrix.iterrows()
        ]
    tables = [pd.DataFrame(part).to_markdown(index=False) for part in (rows, lines)]
    return f"{tables[0]}\n\nIn nats:\n\n{tables[1]}"


def grid(lab: Lab) -> str:
    """Metrics and strategies."""
    few = {ask: some[:16] for ask, some in lab.tried.items()}
    found = ml.experiments.selection_grid(
        lab.model, few, lab.scores, RATIO, batch_size=BATCH, metric="begins"
    )
    return f"{found.summary}\n\n{lab.picture(found, 'grid')}"


def values(lab: Lab) -> str:
    """What is written in place of the activation."""
    found = ml.experiments.ablation_values(
        lab.model, lab.tried, lab.scores, ratio=RATIO, seeds=[0], batch_size=BATCH, metric="begins"
    )
    return f"{found.summary}\n\n{costs(found.frame, ['written', 'off', 'neurons'])}"


def needed(lab: Lab) -> str:
    """Deletion and insertion curves."""
    few = {ask: some[:16] for ask, some in lab.tried.items()}
    found = ml.experiments.necessity(
        lab.model, few, lab.scores, lab.subject.inputs, seeds=[0], batch_size=BATCH, metric="begins"
    )
    return f"{found.summary}\n\n{lab.picture(found, 'necessity')}"


def selected(lab: Lab) -> str:
    """Overlap, layers, and whether other samples give the same neurons."""
    msns = lab.scores.select(RATIO)
    asked = zip(*lab.mined.values(), strict=True)
    both = [sample for question in asked for sample in question]
    parts = [
        ml.mine(lab.model, both[n : n + 10], batch_size=10, progress=False)
        for n in range(0, len(both), 10)
    ]
    found = [
        ml.experiments.overlap(msns),
        ml.experiments.layer_distribution(msns),
        ml.experiments.stability(parts, RATIO),
    ]
    return "\n\n".join(one.summary for one in found)


def attention(lab: Lab) -> str:
    """Whether the attention metrics add anything."""
    data = [sample for some in lab.mined.values() for sample in some]
    return ml.experiments.attention_effect(lab.model, data, batch_size=BATCH).summary


def lens(lab: Lab) -> str:
    """Entropy by layer and modality, and where it changes course."""
    lines = []
    for ask, some in lab.tried.items():
        seen = ml.run(lab.model, some, ml.LogitLensAnalyzer(), batch_size=8)
        for modality, found in seen.stages().items():
            ends = [f"{layer} [{low}, {high}]" for layer, low, high in zip(*found, strict=True)]
            lines.append(
                f"- asked about the {ask}, {modality} tokens: entropy changes course at layer "
                f"{', '.join(ends) or '(none)'}"
            )
    return "\n".join(lines)


def convergence(lab: Lab) -> str:
    """CKA, distance, separability and dimension by layer, beside their nulls."""
    medium = lab.subject.inputs[0]
    states = ml.run(lab.model, lab.tried[medium], ml.ConvergenceAnalyzer(samples=64), batch_size=8)
    curves = states.curves(shuffles=20)
    shown = curves[curves["layer"] % 5 == 0]
    pair = (shown["modality"] + " " + shown["other"]).str.strip()
    wide = shown.assign(pair=pair).pivot_table("mean", ["measure", "pair"], "layer", sort=False)
    return f"{shown_as(states)}\n\n{wide.round(3).reset_index().to_markdown(index=False)}"


def flow(lab: Lab) -> str:
    """Attention of the last token cut off from a modality, by windows of layers."""
    medium = lab.subject.inputs[0]
    few = lab.tried[medium][:16]
    found = ml.information_flow(lab.model, few, [medium, "text"], 6, BATCH)
    curves = found.curves()
    shown = curves[curves["measure"] == "logprob"] if "measure" in curves else curves
    return f"{shown_as(found)}\n\n{shown.round(3).to_markdown(index=False)}"


def patching(lab: Lab) -> str:
    """What neurons restore of the difference between a prompt and its counterfactual."""
    medium = lab.subject.inputs[0]
    pairs = ml.counterfactuals(ml.datasets.load(lab.subject.data, limit=300, ask=medium), 16)
    msns = lab.scores.select(RATIO)
    everything = ml.NeuronSet.union(msns)
    sets = {
        **msns,
        "all": everything,
        "random, as all": ml.NeuronSet.random(len(everything), everything, seed=0),
    }
    return shown_as(ml.activation_patching(lab.model, pairs, sets))


def domains(lab: Lab) -> str:
    """MMNeuron's domain neurons, and each domain without each domain's."""
    if not lab.subject.domains:
        return "There is one domain only."
    every = {
        data: ml.datasets.load(data, limit=lab.mined_count + lab.tried_count, ask=ask)
        for data, ask in lab.subject.domains
    }
    first = {name: some[: lab.mined_count] for name, some in every.items()}
    last = {name: some[lab.mined_count :] for name, some in every.items()}
    counts = ml.run(lab.model, labelled(first), ml.DomainAnalyzer(), batch_size=8)
    matrix = ml.domain_matrix(lab.model, labelled(last), counts.select(0.01))
    return f"{shown_as(matrix)}\n\n{matrix.to_frame().round(3).to_markdown(index=False)}"


PARTS: Mapping[str, tuple[str, Callable[[Lab], str]]] = {
    "controls": ("MSNs beside their controls, 2 %", controls),
    "ratios": ("How many neurons", ratios),
    "specific": ("Are they specific?", specific),
    "grid": ("Metrics and strategies (16 questions)", grid),
    "values": ("What is written in their place", values),
    "needed": ("Necessary, and sufficient? (16 questions)", needed),
    "selected": ("Shared, where, and stable?", selected),
    "attention": ("Do the attention metrics add anything?", attention),
    "domains": ("Domain neurons", domains),
    "lens": ("Logit lens", lens),
    "convergence": ("Do modalities converge?", convergence),
    "flow": ("Information flow to the last token (16 questions)", flow),
    "patching": ("Patching (16 pairs)", patching),
}


def shown_as(result: Any) -> str:
    """What a result prints, as Markdown leaves it."""
    return f"```\n{result!r}\n```"


def costs(frame: pd.DataFrame, about: Sequence[str]) -> str:
    """Costs by row and input, with their intervals, as a Markdown table."""
    shown = frame[[*about, "label", "measure"]].copy()
    shown["cost"] = [
        f"{row.cost:z.3f} [{row.low:z.3f}, {row.high:z.3f}]" for row in frame.itertuples()
    ]
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


def main() -> None:
    """Do the parts that are left, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("organism", choices=SUBJECTS)
    parser.add_argument("--mined", type=int, default=100)
    parser.add_argument("--tried", type=int, default=64)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--work", type=Path, default=Path("results"))
    options = parser.parse_args()
    lab = Lab(options.organism, options.mined, options.tried, options.images)
    folder = options.work / options.organism
    folder.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        file = folder / f"{part}.md"
        if not file.exists():
            begun = time.perf_counter()
            text = PARTS[part][1](lab)
            file.write_text(text)
            print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    page = [
        f"# {options.organism}: what the experiments say\n\nEvery number here is written by "
        f"`python -m benchmarks.organisms {options.organism} --mined {options.mined} "
        f"--tried {options.tried}`: {options.mined} questions of {lab.subject.data} through each "
        f"input modality are mined, {options.tried} others tried. `correct`: greedy decoding "
        "begins with the answer. Intervals are 95 % bootstrap intervals over questions.\n"
    ]
    for part, (title, _) in PARTS.items():
        if (file := folder / f"{part}.md").exists():
            page.append(f"## {title}\n\n{file.read_text()}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.organism}.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
