"""Attribution: what the answer's log-probability would lose with a neuron switched off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import einsum
from torch import Tensor

from miner_lens.installed import versions
from miner_lens.models.points import Point, activation_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.running.passes import BatchSize, Objective, OnError
from miner_lens.running.run import Data, run
from miner_lens.scoring.scores import ImportanceScores

METRIC = "attribution"


class AttributionAnalyzer(Analyzer[ImportanceScores]):
    """The first-order effect of switching each neuron off at each modality's tokens.

    Of a sample, modality and neuron: the sum over the modality's tokens of X times the gradient of
    the objective with respect to X. To first order it is what the objective (by default the
    log-probability of the answer, in nats) loses when the neuron is set to 0 at these tokens alone:
    positive where the neuron helps, negative where it hurts. It is not normalised.

    It reads one forward and one backward pass a sample (attribution patching; Nanda 2023; for
    neurons, Kramár et al. 2024, arXiv 2403.00745). It does not see what neurons do together, nor
    what is far from linear: measure what matters with `ml.trials`.

    Args:
        data: A name of the data set, kept with the scores.
        site: Where the neurons live: `"llm"`, or a tower of the model.
    """

    needs_gradients = True

    def __init__(self, data: str | None = None, site: str = "llm") -> None:
        super().__init__(site)
        self.data = data

    @property
    def settings(self) -> dict[str, Any]:
        """What two analyzers must share to be merged or continued; not the name of the data."""
        return {"site": self.site}

    def points(self, model: Any) -> list[Point]:
        """X of every layer."""
        return activation_points(model, self.site)

    def see(  # type: ignore[override]
        self, x: Tensor, point: Point, batch: Batch, gradient: Tensor
    ) -> None:
        """Add up effects and mean activations of a layer."""
        masks = batch.stacked.to(x.device).float()
        wide = x.float()
        effects = einsum(
            masks,
            wide * gradient.float(),
            "sample modality pos, sample pos neuron -> modality neuron",
        )
        shares = masks / masks.sum(-1, keepdim=True).clamp(min=1)
        means = einsum(shares, wide, "sample modality pos, sample pos neuron -> modality neuron")
        for index, modality in enumerate(batch.masks):
            self.sum(
                modality, self.widened(torch.stack([effects[index], means[index]])), at=point.layer
            )

    def result(self) -> ImportanceScores:
        """The mean over samples, in which an absent modality counts as 0; metric `attribution`."""
        if self.samples == 0 or self.identity is None:
            raise ValueError("No sample has been seen, so there are no scores.")
        counts, layers, neurons = self.occurrences, self.identity.layers, self.identity.neurons
        none = torch.zeros(layers, 2, neurons)
        # [modality layer (effect, mean) neuron]
        sums = torch.stack([(self[name] if counts[name] else none).cpu() for name in counts])
        means = [total[:, 1] / max(1, n) for total, n in zip(sums, counts.values(), strict=True)]
        return ImportanceScores(
            (sums[:, :, 0] / self.samples)[None].float(),
            tuple(counts),
            metrics=(METRIC,),
            samples=self.samples,
            occurrences=tuple(counts.values()),
            skipped=self.skipped,
            means=torch.stack(means).float(),
            identity=self.identity,
            info={"data": self.data, "versions": versions()},
        )


def attribute(
    model: Any,
    data: Data,
    objective: Objective = "answer",
    batch_size: BatchSize = 1,
    limit: int | None = None,
    on_error: OnError = "raise",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    checkpoint_every_samples: int | None = None,
    site: str = "llm",
) -> ImportanceScores:
    """Score every neuron by what its activation at each modality's tokens does for the answer.

    It is `run` with one `AttributionAnalyzer`; all arguments are theirs. Scores are selected,
    saved and drawn as those of `mine`.

    Args:
        model: A `TransformerBridge`, from `ml.load`, `ml.wrap` or TransformerLens itself.
        data: Samples with answers.
        objective: `"answer"`, or a function of the logits and the batch.
        batch_size: Samples in one pass, or `"auto"`; changes speed, not results.
        limit: So many samples at most, the first ones.
        on_error: `"raise"` or `"skip"` samples that cannot be used.
        progress: Whether to show a progress bar.
        checkpoint: A folder from which a run that was stopped continues.
        checkpoint_every: Seconds between two writes to it.
        checkpoint_every_samples: Write also after so many samples of a process.
        site: Where the neurons live: `"llm"`, or a tower of the model.

    Returns:
        Scores [metric modality layer neuron] with the one metric `attribution`, signed, in units of
        the objective (nats), mean over samples.

    Example:
        scores = ml.attribute(model, data)
        msns = scores.select(ratio=0.005)
    """
    analyzer = AttributionAnalyzer(getattr(data, "name", None), site)
    scores: ImportanceScores = run(
        model,
        data,
        analyzer,
        objective=objective,
        batch_size=batch_size,
        limit=limit,
        on_error=on_error,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        checkpoint_every_samples=checkpoint_every_samples,
    )
    return scores
