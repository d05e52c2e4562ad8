"""How long each experiment takes from one line of the command, on an organism.

    python -m benchmarks.lines                      # all of them, on shapes
    python -m benchmarks.lines --only flow patch --model smol-vl

Each line is a process of its own with the command's own numbers of samples. Beside the seconds on
the clock stand those of the processor, which a busy machine does not lengthen.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from miner_lens.cli.experiments import EXPERIMENTS

BOTH = ("easy-vqa:image", "easy-vqa:text")
LONGEST = 120.0  # seconds that a line may take


@dataclass(frozen=True)
class Line:
    """A line of the command without `--out`; `model` is where the model is named."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Taken:
    """What a line took, in seconds on the clock and of the processor."""

    clock: float
    processor: float


def lines(model: str) -> Iterator[Line]:
    """Every experiment that the command has, with its own defaults; `layers` only reads scores."""
    for name in EXPERIMENTS:
        yield Line(name, ("experiment", name, model, *BOTH))
    yield Line("evaluate", ("evaluate", model, *BOTH))
    yield Line("attention", ("attention", model, "easy-vqa"))
    yield Line("recovery", ("recovery",))
    yield Line("stability", ("stability", model, "easy-vqa", "digits"))
    yield Line("domains", ("domains", model, "easy-vqa", "digits", "--tried", "20"))
    yield Line("compare", ("compare", model, *BOTH))
    for name in ("kinds", "convergence", "reach", "flow", "patch", "lens"):
        yield Line(name, (name, model, "easy-vqa"))
    yield Line("tune-lens", ("tune-lens", model, "easy-vqa:both"))
    for method in ("gradient", "integrated", "contribution"):
        how = ("attribute", model, "easy-vqa", "--by", method)
        yield Line(f"attribute, {method}", how)
    yield Line("neuron", ("neuron", model, "3", "17"))
    for paper in ("miner", "mmneuron"):
        yield Line(f"reproduce {paper}", ("reproduce", paper, "--model", model, "--limit", "12"))


def measured(line: Line, folder: Path) -> Taken:
    """Run a line in a process of its own.

    Raises:
        RuntimeError: It fails; its last words are in the message.
    """
    out = folder / line.name.replace(", ", "-").replace(" ", "-")
    if line.arguments[0] == "attribute":
        out = out.with_suffix(".safetensors")
    code = "from miner_lens.cli import app; app(prog_name='miner-lens')"
    command = [sys.executable, "-c", code, *line.arguments, "--out", str(out)]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    clock, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise RuntimeError(f"{line.name} failed: {done.stdout[-2000:]}")
    spent = after.children_user + after.children_system
    return Taken(clock, spent - before.children_user - before.children_system)


def main() -> None:
    """Run the lines one after another and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shapes", help="an organism (default shapes)")
    parser.add_argument("--only", nargs="+", help="names of lines; default all")
    options = parser.parse_args()
    print(f"{'line':28} {'clock s':>8} {'processor s':>12}", flush=True)
    with TemporaryDirectory() as folder:
        for line in lines(options.model):
            if options.only and line.name not in options.only:
                continue
            taken = measured(line, Path(folder))
            late = "" if min(taken.clock, taken.processor) <= LONGEST else "  longer than allowed"
            print(f"{line.name:28} {taken.clock:8.1f} {taken.processor:12.1f}{late}", flush=True)


if __name__ == "__main__":
    main()
