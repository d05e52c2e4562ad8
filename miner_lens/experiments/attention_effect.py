"""Do the attention metrics add anything to the mean?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from miner_lens.analyzers.attention_bound import PUBLISHED, AttentionBoundAnalyzer
from miner_lens.analyzers.importance import AttentionMode, ImportanceAnalyzer
from miner_lens.experiments.figures import COLOURS, panels
from miner_lens.experiments.result import Finding
from miner_lens.running.passes import BatchSize
from miner_lens.running.run import Data, run
from miner_lens.scoring.kernels import METRICS
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.select import default_weights

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# The published weights, and those of a selection that never saw attention.
_WITHOUT = default_weights(("prob", "mean", "max"))


@dataclass(frozen=True, eq=False, repr=False)
class AttentionEffect(Finding):
    """How far attn_k and attn_q are from the mean, and how far they could be.

    The table has a row for each of attn_k and attn_q, modality that occurs, and layer: `tokens`
    (mean number), `largest` (the largest attention within the modality), `moved` (the share of
    weight that the metric moves away from equal weights, mean over samples), `moved_bound` (what
    `largest` allows), `score_bound` (how far normalised scores can be from the mean's), `distance`
    (how far they are, of the neuron with the largest distance), and `correlation` with the mean
    over the layer's neurons.

    `info["sets"]` has, for each modality, how many neurons the published weights select, and how
    many of them 0.75 mean + 0.25 max selects too.
    """

    @property
    def summary(self) -> str:
        """The correlation, the distance beside its bound, and the selections."""
        parts = []
        for metric, rows in self.frame.groupby("metric", sort=False):
            parts.append(
                f"{metric} correlates with the mean at {rows['correlation'].min():.4f} or more in "
                f"every layer and modality, and no score is farther from it than "
                f"{rows['distance'].max():.4f} (the bound allows {rows['score_bound'].max():.4f})"
            )
        sets = self.info["sets"]
        shared = ", ".join(f"{name} {s['shared']} of {s['neurons']}" for name, s in sets.items())
        return (
            f"{'; '.join(parts)}. Of the neurons that {self.info['strategy']} selects at "
            f"{self.info['ratio']:.1%}, weights without attention select {shared}."
        )

    def figure(self) -> Figure:
        """Distance (solid) and its bound (dashed) by layer, a panel for each metric."""
        found, axes = panels(len(PUBLISHED))
        for panel, (metric, rows) in zip(axes, self.frame.groupby("metric"), strict=True):
            for modality, line in rows.groupby("modality", sort=False):
                look = {
                    "color": COLOURS.get(str(modality), "#999999"),
                    "alpha": 0.5 if modality == "special_text" else 1.0,  # whose colour is text's
                }
                panel.plot(line["layer"], line["distance"], label=modality, **look)
                panel.plot(line["layer"], line["score_bound"], "--", **look)
            panel.set(title=f"{metric} beside the mean", xlabel="layer of the llm", yscale="log")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
        axes[0].set_ylabel("distance of scores (dashed: bound)")
        axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return found


def attention_effect(
    model: Any,
    data: Data,
    attention: AttentionMode = "bidirectional",
    ratio: float = 0.02,
    strategy: str = "LA_MU",
    batch_size: BatchSize = 1,
    limit: int | None = None,
    progress: bool = True,
) -> AttentionEffect:
    """Whether attn_k and attn_q add anything to the mean, on a model and data.

    They take a softmax of attention probabilities, which makes the weights of tokens nearly equal.
    docs/method.md derives how far they can be from the mean; this measures how far they are.

    Args:
        model: A `TransformerBridge`.
        data: Samples, or prepared pairs.
        attention: As for `mine`.
        ratio: Share of neurons for the selections that are compared.
        strategy: Their strategy.
        batch_size: As for `run`.
        limit: As for `run`.
        progress: As for `run`.

    Raises:
        ValueError: As `run` and `ImportanceScores.select`.

    Example:
        found = ml.experiments.attention_effect(model, data)
        print(found.summary)
    """
    analyzers = ImportanceAnalyzer(attention), AttentionBoundAnalyzer(attention)
    options: Any = {"batch_size": batch_size, "limit": limit, "progress": progress}
    scores, bound = run(model, data, *analyzers, **options)
    table = bound.to_frame().merge(beside_mean(scores), on=["metric", "modality", "layer"])
    selections = [scores.select(ratio, strategy, weights=w) for w in (None, _WITHOUT)]
    sets = {
        name: {"neurons": len(chosen), "shared": len(chosen & selections[1][name])}
        for name, chosen in selections[0].items()
    }
    info = {"attention": attention, "ratio": ratio, "strategy": strategy, "sets": sets}
    return AttentionEffect(table, info)


def beside_mean(scores: ImportanceScores) -> pd.DataFrame:
    """How far scores of attn_k and attn_q are from those of the mean.

    Returns:
        A row for each of the two, modality that occurs and layer: `metric`, `modality`, `layer`,
        `distance` (the largest over neurons) and `correlation` (Pearson's over neurons).

    Raises:
        ValueError: The scores lack one of MINER's metrics.
    """
    import pandas as pd

    if missing := [metric for metric in METRICS if metric not in scores.metrics]:
        raise ValueError(
            f"These scores have no {missing[0]}, only {', '.join(scores.metrics)}. Mine with all "
            "five metrics to compare attention with the mean."
        )
    rows = []
    mean = scores.values[scores.metrics.index("mean")].double()
    for metric in PUBLISHED:
        values = scores.values[scores.metrics.index(metric)].double()
        for place, modality in enumerate(scores.modalities):
            if not scores.occurrences[place]:
                continue
            for layer in range(scores.layers):
                both = torch.stack([values[place, layer], mean[place, layer]])
                rows.append(
                    {
                        "metric": metric,
                        "modality": modality,
                        "layer": layer,
                        "distance": float((both[0] - both[1]).abs().max()),
                        "correlation": float(torch.corrcoef(both)[0, 1]),
                    }
                )
    return pd.DataFrame(rows)
