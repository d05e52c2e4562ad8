"""How far attn_k and attn_q can be from the mean on the data at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from miner_lens.analyzers.attention_sums import AttentionSums, LargestAttention
from miner_lens.analyzers.importance import AttentionMode, ImportanceAnalyzer
from miner_lens.models.points import Point, activation_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring import kernels
from miner_lens.scoring.attention_bound import moved_weight, score_bound

if TYPE_CHECKING:
    import pandas as pd

PUBLISHED = ("attn_k", "attn_q")
_MEAN, _MAX = kernels.METRICS.index("mean"), kernels.METRICS.index("max")


@dataclass(frozen=True, eq=False, repr=False)
class AttentionBound:
    """What the attention of the data allows attn_k and attn_q to differ from the mean.

    Attributes:
        modalities: Names of the axis.
        tokens: Mean number of tokens in S.
        largest: The largest attention probability in P[S, S] of any sample.
        moved: Mean share of weight that attn_k and attn_q move away from equal weights.
        moved_bound: Mean bound on it, given each sample's largest attention.
        score_bound: Bound on the distance of the data's normalised attention scores from those of
            the mean, of whatever neuron: the mean over samples of each one's bound.
    """

    modalities: tuple[str, ...]
    tokens: Float[Tensor, "modality layer"]
    largest: Float[Tensor, "modality layer"]
    moved: Float[Tensor, "metric modality layer"]
    moved_bound: Float[Tensor, "modality layer"]
    score_bound: Float[Tensor, "modality layer"]

    def to_frame(self) -> pd.DataFrame:
        """A row for each of attn_k and attn_q, modality and layer; a column for each attribute."""
        import pandas as pd

        axes = [PUBLISHED, self.modalities, range(self.tokens.shape[1])]
        table = pd.MultiIndex.from_product(axes, names=["metric", "modality", "layer"]).to_frame(
            index=False
        )
        for name in ("tokens", "largest", "moved", "moved_bound", "score_bound"):
            value = getattr(self, name).expand_as(self.moved)
            table[name] = value.flatten().double().numpy()
        return table

    def __repr__(self) -> str:
        lines = ["AttentionBound (worst layer)"]
        for place, name in enumerate(self.modalities):
            lines.append(
                f"  {name}: {self.tokens[place].mean():.0f} tokens, attention up to "
                f"{self.largest[place].max():.3f}; weight moved {self.moved[:, place].max():.4f}, "
                f"at most {self.moved_bound[place].max():.4f}; scores differ by at most "
                f"{self.score_bound[place].max():.4f}"
            )
        return "\n".join(lines)


class AttentionBoundAnalyzer(Analyzer[AttentionBound]):
    """How far attn_k and attn_q can be from the mean in the decoder, given the attention there is.

    The published metrics take a softmax of attention probabilities, which makes the weights of
    tokens nearly equal. This reads the largest attention within each modality and gives the bounds
    that docs/method.md derives from it, beside the share of weight that is really moved.

    Args:
        attention: As for `ImportanceAnalyzer`, with which it shares what it reads.

    Example:
        scores, bound = ml.run(model, data, ml.ImportanceAnalyzer(), AttentionBoundAnalyzer())
    """

    def __init__(self, attention: AttentionMode = "bidirectional") -> None:
        super().__init__()
        self.attention = ImportanceAnalyzer(attention).attention  # checks it
        self._sums = AttentionSums("llm", attention == "causal")
        self._largest = LargestAttention("llm", attention == "causal")

    def needs(self) -> list[AttentionSums]:
        """The attention sums of every layer, and the largest attention."""
        return [self._sums, self._largest]

    def points(self, model: Any) -> list[Point]:
        """X of every layer."""
        return activation_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Add up a layer's bounds, and what is really moved."""
        masks = batch.stacked.to(x.device)
        sums = self._sums.of_layer(batch, point.layer).to(x.device)
        largest = self._largest.of_layer(batch, point.layer).to(x.device)
        tokens = masks.sum(-1)
        raw = kernels.statistics(x, sums, masks, batch.parts)
        lowest = -kernels.maxima(-x, masks, x.is_cpu).float()
        present = tokens > 0
        widest = torch.where(present[..., None], raw[:, _MAX] - lowest, 0.0).amax(-1)
        spread = raw[:, _MEAN].amax(-1) - raw[:, _MEAN].amin(-1)
        bound = moved_weight(tokens.float(), largest)
        shares = sums / tokens.clamp(min=1)[:, None, :, None]
        equal = masks / tokens.clamp(min=1)[..., None]
        moved = (shares - equal[:, None]).abs().sum(-1) / 2  # [sample direction modality]
        kept = [tokens, moved[:, 0], moved[:, 1], bound, score_bound(bound, widest, spread)]
        total = torch.stack([one.float() for one in kept]).sum(1)
        for index, modality in enumerate(batch.masks):
            self.max(f"{modality}.largest", largest[:, index].amax(), at=point.layer)
            self.sum(modality, total[:, index], at=point.layer)

    def result(self) -> AttentionBound:
        """Means over the samples in which a modality occurs; of scores, over all samples."""
        counts = self.occurrences
        if self.samples == 0 or self.identity is None:
            raise ValueError("No sample has been seen, so there is no bound.")
        none = torch.zeros(self.identity.layers, 5)
        peaks = [self[f"{name}.largest"].cpu() if counts[name] else none[:, 0] for name in counts]
        sums = torch.stack([(self[name] if counts[name] else none).cpu() for name in counts])
        occurring = torch.tensor(list(counts.values())).clamp(min=1)[:, None]
        tokens, by_key, by_query, bound, scores = sums.unbind(-1)
        return AttentionBound(
            tuple(counts),
            tokens / occurring,
            torch.stack(peaks),
            torch.stack([by_key, by_query]) / occurring,
            bound / occurring,
            scores / self.samples,
        )
