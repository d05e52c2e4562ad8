"""MINER's importance scores as an analyzer: stages 1 to 3 in one streaming pass."""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from miner_lens.analyzers.attention_sums import AttentionSums
from miner_lens.models.inside import hf_model_of
from miner_lens.models.points import Point, activation_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch, TowerBatch
from miner_lens.running.batches import BatchSize
from miner_lens.running.passes import OnError
from miner_lens.running.run import Data, run
from miner_lens.scoring import kernels
from miner_lens.scoring.scores import ImportanceScores

MEAN = kernels.METRICS.index("mean")
AttentionMode = Literal["bidirectional", "causal"] | None


class ImportanceAnalyzer(Analyzer[ImportanceScores]):
    """Scores every neuron of a site by modality (MINER, stages 1 to 3).

    Args:
        attention: Which attention weighs the tokens: `"bidirectional"`, the head mean of
            softmax(QK^T / sqrt d) without a causal mask, as the published code computes it, or
            `"causal"`, the pattern that the model really has. A model that scales QK^T by another
            number has its own scale in both. None: no attention is read, `attn_k` and `attn_q` are
            0.
        data: A name of the data set, kept with the scores.
        site: Where the neurons live: `"llm"`, or a tower of the model, `"vision"`, `"audio"` or
            `"projector"`, in which only the tower's own modalities occur. A tower attends without
            a causal mask, and each image, frame of a video or clip only to itself.
    """

    def __init__(
        self,
        attention: AttentionMode = "bidirectional",
        data: str | None = None,
        site: str = "llm",
    ) -> None:
        if attention not in ("bidirectional", "causal", None):
            raise ValueError(
                f"attention must be 'bidirectional', 'causal' or None, not {attention!r}."
            )
        super().__init__(site)
        self.attention = attention
        self.data = data
        self._sums = AttentionSums(site, causal=site == "llm" and attention == "causal")

    @property
    def settings(self) -> dict[str, Any]:
        """What two analyzers must share to be merged or continued; not the name of the data."""
        return {"attention": self.attention, "site": self.site}

    def begin(self, model: Any) -> None:
        """Note the model; refuse another one than before, or one whose pattern is not computed.

        Raises:
            ValueError: For causal attention, the model's own pattern has a sliding window or a soft
                cap.
        """
        super().begin(model)
        if self._sums.causal:
            _require_plain_attention(model)

    def needs(self) -> list[AttentionSums]:
        """The attention sums of every layer, shared with other analyzers."""
        return [] if self.attention is None else [self._sums]

    def points(self, model: Any) -> list[Point]:
        """X of every layer."""
        return activation_points(model, self.site)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Add up normalised scores and mean activations of a layer."""
        if isinstance(batch, TowerBatch):
            self._see_tower(x, point, batch)
            return
        masks = batch.stacked.to(x.device)
        if self.attention is None:
            sums = _no_sums(masks)
        else:
            sums = self._sums.of_layer(batch, point.layer).to(x.device)
        self._add_scores(x, sums, masks, point, tuple(batch.masks), batch.parts)

    def _see_tower(self, x: Tensor, point: Point, batch: TowerBatch) -> None:
        # Attention stays within an image or a frame, so each sample is one product by itself.
        unread = self.attention is None
        all_sums = None if unread else self._sums.of_call(batch, point.layer)
        for number, (sample, start, stop) in enumerate(batch.spans):
            masks = batch.stacked[sample : sample + 1, :, : stop - start].to(x.device)
            rows = x[sample : sample + 1, : stop - start]
            sums = _no_sums(masks) if all_sums is None else all_sums[number].to(x.device)
            self._add_scores(rows, sums, masks, point, tuple(batch.masks), None)

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
        kept = torch.cat([kernels.normalise(raw, masks).sum(0), raw[:, MEAN].sum(0)[None]])
        for index, modality in enumerate(modalities):
            self.sum(modality, kept[:, index], at=point.layer)

    def result(self) -> ImportanceScores:
        """The mean over samples, in which an absent modality counts as 0."""
        if self.samples == 0 or self.identity is None:
            raise ValueError("No sample has been seen, so there are no scores.")
        counts, layers, neurons = self.occurrences, self.identity.layers, self.identity.neurons
        none = torch.zeros(layers, len(kernels.METRICS) + 1, neurons)
        # [modality layer metric neuron], as `_add_scores` has kept them.
        sums = torch.stack([(self[name] if counts[name] else none).cpu() for name in counts])
        scores = sums[:, :, :-1].permute(2, 0, 1, 3) / self.samples
        means = [total[:, -1] / max(1, n) for total, n in zip(sums, counts.values(), strict=True)]
        return ImportanceScores(
            scores.float(),
            tuple(counts),
            samples=self.samples,
            occurrences=tuple(counts.values()),
            skipped=self.skipped,
            means=torch.stack(means).float(),
            identity=self.identity,
            info={"attention": self.attention, "data": self.data, "versions": versions()},
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
) -> ImportanceScores:
    """Score every neuron by how much each modality's tokens drive it.

    It is `run` with one `ImportanceAnalyzer`; all arguments are theirs.

    Args:
        model: A `TransformerBridge`, from `ml.load`, `ml.wrap` or TransformerLens itself.
        data: Samples, or prepared pairs `(model_inputs, masks)`.
        attention: `"bidirectional"`, as published, or `"causal"`, as the model attends. None, where
            attention cannot be read, leaves `attn_k` and `attn_q` 0.
        batch_size: Samples in one forward pass, or `"auto"`; changes speed, not results.
        limit: So many samples at most, the first ones; a prepared pair counts as one.
        on_error: `"raise"` or `"skip"` samples that cannot be used.
        progress: Whether to show a progress bar.
        checkpoint: A folder from which a run that was stopped continues.
        checkpoint_every: Seconds between two writes to it.
        checkpoint_every_samples: Write also after so many samples of a process.
        site: Where the neurons live: `"llm"`, `"vision"`, `"audio"` or `"projector"`, as far as
            the model has them. For several in one pass, give `run` an `ImportanceAnalyzer` each.

    Returns:
        Scores [metric modality layer neuron], each in 0 to 1.
    """
    analyzer = ImportanceAnalyzer(attention, getattr(data, "name", None), site)
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


def _no_sums(masks: Tensor) -> Tensor:
    """Of no attention, [sample direction modality pos]."""
    return torch.zeros(len(masks), 2, *masks.shape[1:], device=masks.device)


def _require_plain_attention(model: Any) -> None:
    """Refuse patterns other than softmax(scale QK^T) over all earlier tokens."""
    takes = inspect.signature(hf_model_of(model).forward).parameters
    if "token_type_ids" in takes:
        # Which tokens see later ones follows from these: an image's, or all of a prompt's.
        raise ValueError(
            f"attention='causal' scores a causal pattern, but {type(hf_model_of(model)).__name__} "
            "lets some tokens of a prompt attend to later ones (token_type_ids). Use "
            "attention='bidirectional'."
        )
    for layer, block in enumerate(model.blocks):
        attention = getattr(block.attn, "original_component", None) or block.attn
        # Some families keep the window on each layer, where it may be off, others in the config.
        held_by = (
            attention
            if hasattr(attention, "sliding_window")
            else getattr(attention, "config", None)
        )
        window = getattr(held_by, "sliding_window", None)
        other = {
            "a sliding window": window is not None,
            "a soft cap": getattr(attention, "attn_logit_softcapping", None) is not None,
        }
        found = [name for name, present in other.items() if present]
        if found:
            raise ValueError(
                f"attention='causal' scores plain softmax(scale QK^T), but layer {layer} of "
                f"this model attends with {' and '.join(found)}. Use attention='bidirectional'."
            )


def versions() -> dict[str, str]:
    """Of the packages that scores depend on."""
    packages = ("miner-lens", "transformer-lens", "transformers", "torch")
    return {package: importlib.metadata.version(package) for package in packages}
