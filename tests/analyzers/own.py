"""Analyzers as a user would write them; run as a script, one process of a run of two of them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miner_lens as ml


class Sparsity(ml.Analyzer):
    """The share of positive activations, by modality and layer."""

    def points(self, model):  # which hook points
        return ml.activation_points(model, self.site)  # site="llm" unless told otherwise

    def see(self, x, point, batch):  # once for each point and pass
        for modality, mask in batch.masks.items():
            self.sum(f"{modality}.positive", (x[mask] > 0).float().mean(-1).sum(), at=point.layer)
            self.sum(f"{modality}.tokens", mask.sum(), at=point.layer)

    def result(self):  # what it amounts to
        return {m: self[f"{m}.positive"] / self[f"{m}.tokens"] for m in self.modalities}


class LastToken(ml.Analyzer[dict[str, Any]]):
    """Every kind of state, of X at the last token and in two layers of the model."""

    names = ("sum", "max", "min", "top", "keep")

    def points(self, model: Any) -> list[ml.Point]:
        return [point for point in ml.activation_points(model) if point.layer in (0, 2)]

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        last = x[:, -1]  # prompts are padded on the left
        self.sum("sum", last.sum(0), at=point.layer)
        self.max("max", last.amax(0), at=point.layer)
        self.min("min", last.amin(0), at=point.layer)
        self.top("top", last, torch.tensor(batch.index), k=3, at=point.layer)
        if point.layer == 2:
            self.keep("keep", last, at_most=5, seed=1)

    def result(self) -> dict[str, Any]:
        found = {name: self[name] for name in ("sum", "max", "min", "keep")}
        return found | {"values": self["top"].values, "ids": self["top"].ids}


def data(samples: int) -> list[ml.Sample]:
    return list(ml.datasets.load("easy-vqa", limit=samples, ask="both"))


def main(folder: Path, samples: int, kill_after: int | None) -> None:
    """Run both with a checkpoint; SIGKILL comes in the midst of the pass after so many."""
    model = ml.load("shapes", device="cpu")
    passes = 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal passes
        passes += 1
        if kill_after is not None and passes > kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    model.original_model.get_decoder().layers[1].register_forward_hook(count)
    results = ml.run(
        model,
        data(samples),
        Sparsity(),
        LastToken(),
        batch_size=3,
        progress=False,
        checkpoint=folder / "checkpoint",
        checkpoint_every=0.0,
    )
    if results is not None:
        torch.save((results, passes), folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else None)
