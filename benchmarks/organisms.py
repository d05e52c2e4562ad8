"""What the experiments say on a trained organism, as docs/results has it.

`python -m benchmarks.organisms smol-vl` writes docs/results/smol-vl.md and its figures. A part
that is done is kept in `--work`, so that a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import organism_experiments as experiments
from benchmarks import organism_insides as insides
from benchmarks.lab import SUBJECTS, Lab

PARTS: Mapping[str, tuple[str, Callable[[Lab], str]]] = {
    "controls": ("MSNs beside their controls, 2 %", experiments.controls),
    "ratios": ("How many neurons", experiments.ratios),
    "specific": ("Are they specific?", experiments.specific),
    "compared": ("MINER's metrics against attribution", experiments.compared),
    "grid": ("Metrics and strategies", experiments.grid),
    "values": ("What is written in their place", experiments.values),
    "needed": ("Necessary, and sufficient?", experiments.needed),
    "transfer": ("Mined on one data set, off on another", experiments.transferred),
    "selected": ("Shared, where, and stable?", experiments.selected),
    "attention": ("Do the attention metrics add anything?", experiments.attention),
    "kinds": ("What drives them", insides.kinds),
    "domains": ("Domain neurons: data sets", insides.domains),
    "texts": ("Domain neurons: kinds of text", insides.texts),
    "voices": ("Domain neurons: accents", insides.voices),
    "lens": ("Logit lens", insides.lens),
    "tuned": ("Tuned lens", insides.tuned),
    "convergence": ("Do modalities converge?", insides.convergence),
    "reach": ("Semantic probing and telomeres (definitions: ours)", insides.reach),
    "flow": ("Information flow to the last token", insides.flow),
    "patching": ("Patching (16 pairs)", insides.patching),
}


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
    folder = options.work / options.organism
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(options.organism, options.mined, options.tried, options.images, folder)
    for part in options.parts:
        file = folder / f"{part}.md"
        if part not in lab.subject.without and not file.exists():
            begun = time.perf_counter()
            text = PARTS[part][1](lab)
            file.write_text(text)
            print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    page = [
        f"# {options.organism}: what the experiments say\n\nEvery number here is written by "
        f"`python -m benchmarks.organisms {options.organism} --mined {options.mined} "
        f"--tried {options.tried}`: {options.mined} questions of {lab.subject.data} through each "
        f"input modality are mined, {options.tried} others tried. `correct`: greedy decoding "
        "begins with the answer. Intervals are 95 % bootstrap intervals over questions, but those "
        "of convergence, which are a jackknife's.\n"
    ]
    for part, (title, _) in PARTS.items():
        if (file := folder / f"{part}.md").exists():
            count = lab.questions(part)
            fewer = f" ({count} questions)" if count < options.tried else ""
            page.append(f"## {title}{fewer}\n\n{file.read_text()}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.organism}.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
