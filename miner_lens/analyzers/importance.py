"""MINER's importance scores as an analyzer: stages 1 to 3 in one streaming pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from miner_lens.analyzers.attention_sums import AttentionSums, ReceivedAttention
from miner_lens.installed import versions
from miner_lens.models.points import Point, activation_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch, TowerBatch
from miner_lens.running.passes import BatchSize, OnError
from miner_lens.running.run import Data, run
from miner_lens.scoring import kernels
from miner_lens.scoring.scores import ImportanceScores

MEAN = kernels.METRICS.index("mean")
AttentionMode = Literal["bidirectional", "causal"]


class ImportanceAnalyzer(Analyzer[ImportanceScores]):
    """Scores every neuron of a site by modality (MINER, stages 1 to 3).

    Args:
        attention: Which attention weighs the tokens: `"bidirectional"`, the head mean of
            softmax(QK^T / sqrt d) without a causal mask, as the published code computes it, or
            `"causal"`, the pattern that the model really has, with its windows, chunks, sinks and
            soft caps, as the mask and arguments of each pass say. A model that scales QK^T by
            another number has its own scale in both.
        data: A name of the data set, kept with the scores.
        site: Where the neurons live: `"llm"`, or a tower of the model, `"vision"`, `"audio"` or
            `"projector"`, in which only the tower's own modalities occur. A tower attends without
            a causal mask, and each image, frame of a video or clip only to itself.
        metrics: What to score, of `prob`, `mean`, `max`, `attn_k`, `attn_q` and `attended`; MINER's
            five by default. Without the last three attention is not touched, and need not be
            readable. `attended` always takes the pattern that the model really has.
    """

    def __init__(
        self,
        attention: AttentionMode = "bidirectional",
        data: str | None = None,
        site: str = "llm",
        metrics: Sequence[str] = kernels.METRICS,
    ) -> None:
        if attention not in ("bidirectional", "causal"):
            raise ValueError(f"attention must be 'bidirectional' or 'causal', not {attention!r}.")
        super().__init__(site)
        self.attention = attention
        self.data = data
        self.metrics = _checked(metrics)
        self._sums: list[AttentionSums] = []
        computed = ["prob", "mean", "max"]
        if self._published:
            self._sums.append(AttentionSums(site, attention == "causal"))
            computed += ["attn_k", "attn_q"]
        if "attended" in self.metrics:
            self._sums.append(ReceivedAttention(site))
            computed.append("attended")
        # Where the metrics are among those that `statistics` returns.
        self._places = [computed.index(metric) for metric in self.metrics]
        self._directions = len(computed) - 3

    @property
    def settings(self) -> dict[str, Any]:
        """What two analyzers must share to be merged or continued; not the name of the data."""
        return {
            "attention": self.attention if self._published else None,
            "site": self.site,
            "metrics": list(self.metrics),
        }

    @property
    def _published(self) -> list[str]:
        """The published attention metrics that are scored."""
        return [metric for metric in ("attn_k", "attn_q") if metric in self.metrics]

    def needs(self) -> list[AttentionSums]:
        """The attention sums of every layer, shared with other analyzers."""
        return self._sums

    def points(self, model: Any) -> list[Point]:
        """X of every layer."""
        return activation_points(model, self.site)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Add up normalised scores and mean activations of a layer."""
        if isinstance(batch, TowerBatch):
            self._see_tower(x, point, batch)
            return
        masks = batch.stacked.to(x.device)
        found = [sums.of_layer(batch, point.layer).to(x.device) for sums in self._sums]
        sums = torch.cat(found, 1) if found else self._no_sums(masks)
        self._add_scores(x, sums, masks, point, tuple(batch.masks), batch.parts)

    def _see_tower(self, x: Tensor, point: Point, batch: TowerBatch) -> None:
        # Attention stays within an image or a frame, so each sample is one product by itself.
        found = [sums.of_call(batch, point.layer) for sums in self._sums]
        for number, (sample, start, stop) in enumerate(batch.spans):
            masks = batch.stacked[sample : sample + 1, :, : stop - start].to(x.device)
            rows = x[sample : sample + 1, : stop - start]
            here = [all_sums[number].to(x.device) for all_sums in found if all_sums is not None]
            sums = torch.cat(here, 1) if here else self._no_sums(masks)
            self._add_scores(rows, sums, masks, point, tuple(batch.masks), None)

    def _no_sums(self, masks: Tensor) -> Tensor:
        """Weights of 0, for a site without attention, or of no direction at all."""
        shape = (masks.shape[0], self._directions, *masks.shape[1:])
        return torch.zeros(shape, device=masks.device)

    def _add_scores(
        self,
        x: Tensor,
        sums: Tensor,
        masks: Tensor,
        point: Point,
        modalities: tuple[str, ...],
        parts: list[tuple[int, ...]] | None,
    ) -> None:
        raw = kernels.statistics(x, sums, masks, parts)
        # The normalised metrics, and last the mean as it is: [metric modality neuron].
        means = raw[:, MEAN].sum(0)[None]
        scored = torch.stack([raw[:, place] for place in self._places], 1)
        kept = torch.cat([kernels.normalise(scored, masks).sum(0), means])
        for index, modality in enumerate(modalities):
            self.sum(modality, self.widened(kept[:, index]), at=point.layer)

    def result(self) -> ImportanceScores:
        """The mean over samples, in which an absent modality counts as 0."""
        if self.samples == 0 or self.identity is None:
            raise ValueError("No sample has been seen, so there are no scores.")
        counts, layers, neurons = self.occurrences, self.identity.layers, self.identity.neurons
        none = torch.zeros(layers, len(self.metrics) + 1, neurons)
        # [modality layer metric neuron], as `_add_scores` has kept them.
        sums = torch.stack([(self[name] if counts[name] else none).cpu() for name in counts])
        scores = sums[:, :, :-1].permute(2, 0, 1, 3) / self.samples
        means = [total[:, -1] / max(1, n) for total, n in zip(sums, counts.values(), strict=True)]
        info = {"data": self.data, "versions": versions()}
        return ImportanceScores(
            scores.float(),
            tuple(counts),
            metrics=self.metrics,
            samples=self.samples,
            occurrences=tuple(counts.values()),
            skipped=self.skipped,
            means=torch.stack(means).float(),
            identity=self.identity,
            info={"attention": self.attention} | info if self._published else info,
        )


def mine(
    model: Any,
    data: Data,
    attention: AttentionMode = "bidirectional",
    batch_size: BatchSize = 1,
    limit: int | None = None,
    on_error: OnError = "raise",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    checkpoint_every_samples: int | None = None,
    site: str = "llm",
    metrics: Sequence[str] = kernels.METRICS,
) -> ImportanceScores:
    """Score every neuron by how much each modality's tokens drive it.

    It is `run` with one `ImportanceAnalyzer`; all arguments are theirs.

    Args:
        model: A `TransformerBridge`, from `ml.load`, `ml.wrap` or TransformerLens itself.
        data: Samples, or prepared pairs `(model_inputs, masks)`.
        attention: `"bidirectional"`, as published, or `"causal"`, as the model attends.
        batch_size: Samples in one forward pass, or `"auto"`; changes speed, not results.
        limit: So many samples at most, the first ones; a prepared pair counts as one.
        on_error: `"raise"` or `"skip"` samples that cannot be used.
        progress: Whether to show a progress bar.
        checkpoint: A folder from which a run that was stopped continues.
        checkpoint_every: Seconds between two writes to it.
        checkpoint_every_samples: Write also after so many samples of a process.
        site: Where the neurons live: `"llm"`, `"vision"`, `"audio"` or `"projector"`, as far as
            the model has them. For several in one pass, give `run` an `ImportanceAnalyzer` each.
        metrics: What to score, of `prob`, `mean`, `max`, `attn_k`, `attn_q` (MINER's five, the
            default) and `attended`. `("prob", "mean", "max")` never touches attention.

    Returns:
        Scores [metric modality layer neuron], each in 0 to 1.

    Raises:
        ValueError: A metric is unknown, or as `run`.

    Example:
        scores = ml.mine(model, data, metrics=("prob", "mean", "max"))
    """
    analyzer = ImportanceAnalyzer(attention, getattr(data, "name", None), site, metrics)
    scores: ImportanceScores = run(
        model,
        data,
        analyzer,
        batch_size=batch_size,
        limit=limit,
        on_error=on_error,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        checkpoint_every_samples=checkpoint_every_samples,
    )
    return scores


def _checked(metrics: Sequence[str]) -> tuple[str, ...]:
    """Names of metrics, each known and named once."""
    known = ", ".join(kernels.ALL_METRICS)
    if isinstance(metrics, str) or not metrics:
        raise ValueError(f"metrics must be a tuple of names, not {metrics!r}; there are {known}.")
    metrics = tuple(metrics)
    if unknown := [name for name in metrics if name not in kernels.ALL_METRICS]:
        raise ValueError(f"There is no metric {unknown[0]!r}; there are {known}.")
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"A metric is named twice: {', '.join(metrics)}.")
    return metrics
