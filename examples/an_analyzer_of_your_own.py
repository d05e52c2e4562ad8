"""A new analysis is one class: how sparse is each layer, at each modality's tokens?

It runs beside MINER's scores, in the same pass over the data.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.running.run import Batch, Hook, State


class SparsityAnalyzer:
    """The share of positive activations, by layer and modality."""

    def __init__(self) -> None:
        self.positive: dict[str, Tensor] = {}  # [layer]
        self.tokens: dict[str, Tensor] = {}  # scalar
        self._seen: list[Tensor] = []

    def hooks(self, model: Any, batch: Batch | None = None) -> list[Hook]:
        self._seen = []
        layers = range(len(model.blocks))
        return [(f"blocks.{layer}.mlp.act.hook_out", self._see) for layer in layers]

    def _see(self, x: Tensor, hook: Any) -> None:
        self._seen.append((x > 0).float().mean(-1))

    def check(self, batch: Batch) -> None:
        """Any activation can be counted."""

    def update(self, batch: Batch) -> None:
        for modality, mask in batch.masks.items():
            positive = torch.stack([share[mask].sum() for share in self._seen]).double()
            self._add(modality, positive, mask.sum())

    def _add(self, modality: str, positive: Tensor, tokens: Tensor) -> None:
        self.positive[modality] = self.positive.get(modality, 0) + positive
        self.tokens[modality] = self.tokens.get(modality, 0) + tokens

    def merge(self, other: SparsityAnalyzer) -> SparsityAnalyzer:
        merged = SparsityAnalyzer()
        for part in (self, other):
            for modality in part.positive:
                merged._add(modality, part.positive[modality], part.tokens[modality])
        return merged

    def state(self) -> State:
        positive = {f"{name}.positive": tensor for name, tensor in self.positive.items()}
        return positive | {f"{name}.tokens": tensor for name, tensor in self.tokens.items()}

    def restore(self, state: State) -> None:
        self.positive = {k.split(".")[0]: v for k, v in state.items() if k.endswith("positive")}
        self.tokens = {k.split(".")[0]: v for k, v in state.items() if k.endswith("tokens")}

    def result(self) -> pd.DataFrame:
        return pd.DataFrame(
            {
                modality: (positive / self.tokens[modality]).tolist()
                for modality, positive in self.positive.items()
                if self.tokens[modality]
            }
        ).rename_axis("layer")


model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=30)
scores, sparsity = ml.run(model, data, ml.ImportanceAnalyzer(), SparsityAnalyzer(), batch_size=10)
print(scores)
print("Share of positive activations:")
print(sparsity.round(3))
