"""A new analysis is one class: how sparse is each layer, at each modality's tokens?

It runs beside MINER's scores, in the same pass over the data. See docs/writing-an-analyzer.md.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from torch import Tensor

import miner_lens as ml


class Sparsity(ml.Analyzer[pd.DataFrame]):
    """The share of positive activations, by layer and modality."""

    def points(self, model: Any) -> list[ml.Point]:
        return ml.activation_points(model, self.site)

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        for modality, mask in batch.masks.items():
            self.sum(f"{modality}.positive", (x[mask] > 0).float().mean(-1).sum(), at=point.layer)
            self.sum(f"{modality}.tokens", mask.sum(), at=point.layer)

    def result(self) -> pd.DataFrame:
        shares = {m: self[f"{m}.positive"] / self[f"{m}.tokens"] for m in self.modalities}
        return pd.DataFrame({m: share.tolist() for m, share in shares.items()}).rename_axis("layer")


model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=30)
scores, sparsity = ml.run(model, data, ml.ImportanceAnalyzer(), Sparsity(), batch_size=10)
print(scores)
print("Share of positive activations:")
print(sparsity.round(3))
