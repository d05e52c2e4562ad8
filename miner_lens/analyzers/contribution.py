"""Contribution: what a neuron's activation writes towards the answer, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from torch import Tensor

from miner_lens.installed import versions
from miner_lens.models.access import mlps
from miner_lens.models.fingerprint import has_weight
from miner_lens.models.forcing import tokenizer_of
from miner_lens.models.inside import hf_model_of
from miner_lens.models.points import Point, activation_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring.scores import ImportanceScores

METRICS = ("contribution", "contribution_at")


class ContributionAnalyzer(Analyzer[ImportanceScores]):
    """Scores decoder neurons by how much they write towards the answer (Pan et al. 2024).

    A neuron's output direction is its column of the down projection; the direction's product with
    the answer's row of the unembedding says how much it favours the answer. Two metrics, both
    signed and not normalised:

    - `contribution`, as the published code has it: X where the answer is predicted, at the prompt's
      last token, times that product. Of a sample it is the same for each modality that occurs.
    - `contribution_at`: the mean of X at the modality's own tokens, times that product.

    Neither sees what later layers make of what is written, nor the final norm, nor what the up
    projection multiplies X by (arXiv 2311.07470; all three as published), nor the router's weight
    of an expert. The answer is the first
    token of the sample's first one.

    Args:
        data: A name of the data set, kept with the scores.
        centred: Whether to take the product with the mean over the vocabulary off the product with
            the answer, so that what every token gains does not count. Not as published.

    Example:
        scores = ml.run(model, data, ml.ContributionAnalyzer())
        neurons = scores.select(0.005)["image"]
    """

    def __init__(self, data: str | None = None, centred: bool = False) -> None:
        super().__init__("llm")
        self.data, self.centred = data, centred

    @property
    def settings(self) -> dict[str, Any]:
        """What two analyzers must share to be merged or continued; not the name of the data."""
        return {"centred": self.centred}

    def begin(self, model: Any) -> None:
        """Note the model and its weights.

        Raises:
            ValueError: Weights cannot be read, as they are quantized or offloaded, or there is no
                processor to read answers with.
        """
        super().begin(model)
        self._tokenizer = tokenizer_of(model)
        if self._tokenizer is None:
            raise ValueError("Answers need a tokenizer: wrap the model with its processor.")
        head = hf_model_of(model).get_output_embeddings()
        downs = [layer.down for layer in mlps(model)]
        for part in (head, *downs):
            if not has_weight(part) or part.weight.is_meta:
                raise ValueError(
                    "Contribution reads the weights of the down projections and of the head, which "
                    "are quantized or offloaded here. Load the model whole, in a floating dtype."
                )
        self._downs, self._unembedding = downs, head.weight.detach()
        self._middle = self._unembedding.float().mean(0) if self.centred else None

    def points(self, model: Any) -> list[Point]:
        """X of every layer."""
        return activation_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Add up contributions and mean activations of a layer."""
        favours = self._favours(point.layer, batch).to(x.device)
        masks = batch.stacked.to(x.device).float()
        shares = masks / masks.sum(-1, keepdim=True).clamp(min=1)
        wide = x.float()
        means = einsum(
            shares, wide, "sample modality pos, sample pos neuron -> sample modality neuron"
        )
        last = batch.once(("last", x.device), lambda: _last(batch.real.to(x.device)))
        at_last = wide[torch.arange(len(wide), device=x.device), last]
        occurs = masks.any(-1).float()
        wrote = einsum(
            at_last * favours, occurs, "sample neuron, sample modality -> modality neuron"
        )
        at_own = einsum(means, favours, "sample modality neuron, sample neuron -> modality neuron")
        kept = torch.stack([wrote, at_own, means.sum(0)], 1)
        for index, modality in enumerate(batch.masks):
            self.sum(modality, self.widened(kept[index]), at=point.layer)

    def result(self) -> ImportanceScores:
        """The mean over samples, in which an absent modality counts as 0."""
        if self.samples == 0 or self.identity is None:
            raise ValueError("No sample has been seen, so there are no scores.")
        counts, layers, neurons = self.occurrences, self.identity.layers, self.identity.neurons
        none = torch.zeros(layers, len(METRICS) + 1, neurons)
        # [modality layer (metrics, mean) neuron]
        sums = torch.stack([(self[name] if counts[name] else none).cpu() for name in counts])
        means = [total[:, -1] / max(1, n) for total, n in zip(sums, counts.values(), strict=True)]
        return ImportanceScores(
            (sums[:, :, :-1].permute(2, 0, 1, 3) / self.samples).float(),
            tuple(counts),
            metrics=METRICS,
            samples=self.samples,
            occurrences=tuple(counts.values()),
            skipped=self.skipped,
            means=torch.stack(means).float(),
            identity=self.identity,
            info={"data": self.data, "centred": self.centred, "versions": versions()},
        )

    def _favours(self, layer: int, batch: Batch) -> Tensor:
        """[sample neuron], how much each neuron's output direction favours the sample's answer."""
        wanted = batch.once(("answers", self.centred), lambda: self._answers(batch))
        weight = self._downs[layer].weight.detach().flatten(1)
        favours: Tensor = wanted.to(weight.device) @ weight.float()
        return favours

    def _answers(self, batch: Batch) -> Tensor:
        """[sample d_model], the unembedding of the first token of each sample's answer."""
        tokens = []
        for name, sample in zip(batch.ids, batch.samples or [None] * len(batch.ids), strict=True):
            answer = sample.answers[0] if sample is not None and sample.answers else ""
            found = self._tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
            if not found:
                raise ValueError(f"{name} has no answer, so nothing can contribute to it.")
            tokens.append(found[0])
        rows: Tensor = self._unembedding[
            torch.tensor(tokens, device=self._unembedding.device)
        ].float()
        return rows if self._middle is None else rows - self._middle


def _last(real: Tensor) -> Tensor:
    """The place of each sample's last real token."""
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    return (real.long() * places).argmax(1)
