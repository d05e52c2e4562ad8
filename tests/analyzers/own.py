"""Analyzers as a user would write them, and a process of a run of two of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miner_lens as ml
from miner_lens import launchers
from tests.calls import calls_of
from tests.running.test_distributed import everywhere, finish, start


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


def work(model: Any, folder: Path, kill_after: int | None = None) -> None:
    """Run both with a checkpoint; SIGKILL comes in the midst of the pass after so many."""

    def kill(calls: list[Any]) -> None:
        if kill_after is not None and len(calls) > kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    with calls_of(model.original_model.get_decoder().layers[1], kill) as passes:
        results = ml.run(
            model,
            data(16),
            Sparsity(),
            LastToken(),
            batch_size=3,
            progress=False,
            checkpoint=folder / "checkpoint",
            checkpoint_every=0.0,
        )
    torch.save((results, len(passes)), folder / f"results-{launchers.rank()}.pt")


def killed_and_shared(folder: Path) -> None:
    """A run that is killed and continued, and one of two ranks, each in a folder."""
    torch.set_num_threads(1)
    model = ml.load("shapes", device="cpu")
    killed, shared = folder / "killed", folder / "shared"
    assert finish(start(1, lambda rank: work(model, killed, 2), killed), killed) == [None]
    assert list((killed / "checkpoint").glob("*.safetensors"))
    everywhere(1, lambda rank: work(model, killed), killed)
    everywhere(2, lambda rank: work(model, shared), shared)
