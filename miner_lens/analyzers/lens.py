"""The logit lens: what each layer would answer, at every position, if it were the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from miner_lens.analyzers.reading import Lens, Seen
from miner_lens.analyzers.tuning import fitting
from miner_lens.models.forcing import tokenizer_of
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.points import Point, residual_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring.curves import Changes, change_points, curve
from miner_lens.scoring.sample_curves import SampleCurves
from miner_lens.scoring.tuned_lens import TunedLens

MEASURES = ("entropy", "answer", "agreement")
LAST = "last"  # the prompt's last token, where the answer is predicted
KEPT_SAMPLES, KEPT_TOKENS = 10_000, 1_000


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(SampleCurves):
    """What the logit lens shows of a data set, by layer and modality.

    Attributes:
        values: The mean over each sample's tokens of the `MEASURES`: the entropy of the
            distribution, in nats; the probability of the answer's first token (0 without an
            answer); and whether the most probable token is the last layer's. 0 where the sample
            has no token of the modality.
        counts: How many tokens of the modality each sample has.
        modalities: Names of the third axis; `last` is the prompt's last token.
        tops: By modality, the most probable token in each layer at a random sample of its tokens.
        vocabulary: What these tokens are.
        identity: The model.
    """

    filename: ClassVar[str] = "logit-lens.safetensors"

    measures = MEASURES

    tops: Mapping[str, Int[Tensor, "token layer"]]
    vocabulary: Mapping[int, str]

    def stages(
        self, measure: str = "entropy", most: int = 2, resamples: int = 1000, seed: int = 0
    ) -> dict[str, Changes]:
        """Where the mean curve of each modality changes its slope; see `change_points`.

        Two change points tell the three stages apart that MMNeuron describes. The rule is ours.

        Args:
            measure: One of `MEASURES`.
            most: At most so many change points.
            resamples: Of the bootstrap over samples.
            seed: Of the bootstrap.
        """
        return {
            modality: change_points(
                curve(self.of(modality, measure).double().numpy(), resamples, seed), most
            )
            for modality, one in self.pairs()
            if one == measure
        }

    def top_tokens(self, modality: str, k: int = 5) -> list[list[tuple[str, float]]]:
        """In each layer, the tokens that most often are the most probable one, with their share.

        Raises:
            KeyError: There is no such modality.
        """
        if modality not in self.tops:
            raise KeyError(f"There is no {modality!r} here; there are {', '.join(self.tops)}.")
        tokens = self.tops[modality]
        layers = []
        for column in tokens.T:
            unique: Any = torch.unique
            found, counts = unique(column, return_counts=True)
            order = counts.argsort(descending=True, stable=True)[:k].tolist()
            shares = (counts / len(column)).tolist()
            layers.append([(self.vocabulary[int(found[n])], shares[n]) for n in order])
        return layers

    def __repr__(self) -> str:
        layers = self.values.shape[1]
        lines = [f"LogitLens({len(self.values)} samples, {layers} layers; mean entropy in nats)"]
        for modality in self.known():
            row = self.of(modality).mean(0).tolist()
            lines.append(f"{modality:<12}" + "".join(f" {value:6.2f}" for value in row))
        return "\n".join(lines)

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the result holds."""
        tensors: dict[str, Tensor | None] = {"values": self.values, "counts": self.counts}
        tensors |= {f"tops/{name}": tokens for name, tokens in self.tops.items()}
        words = {str(token): text for token, text in self.vocabulary.items()}
        return tensors, {"modalities": self.modalities, "vocabulary": words}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> LogitLens:
        """The result that a file holds."""
        modalities = tuple(metadata["modalities"])
        return cls(
            tensors["values"],
            tensors["counts"],
            modalities,
            {name: tensors[f"tops/{name}"] for name in modalities if f"tops/{name}" in tensors},
            {int(token): text for token, text in metadata["vocabulary"].items()},
            identity=identity,
        )


class LogitLensAnalyzer(Analyzer[LogitLens]):
    """Puts the final norm and head on the residual stream after each layer, at every position.

    It streams: of no more than a few positions at a time are there logits, and what is kept of a
    sample is a mean for each layer and modality (nostalgebraist 2020; for multimodal models
    MMNeuron, Huo et al. 2024, arXiv 2406.11193). The head costs as much in every layer as it does
    at the end of the model, so a run takes several times a plain one.

    Args:
        tuned: A lens to look through, fitted by `TunedLensAnalyzer`; without it, the plain one.

    Example:
        lens = ml.run(model, data, ml.LogitLensAnalyzer())
        lens.curves(), lens.stages()
    """

    def __init__(self, tuned: TunedLens | None = None) -> None:
        super().__init__("llm")
        self.tuned = tuned

    def begin(self, model: Any) -> None:
        """Note the model, its final norm and its head.

        Raises:
            ValueError: The model has none of them that can be called, or the tuned lens was fitted
                to another model.
        """
        super().begin(model)
        self._tuned = None if self.tuned is None else fitting(self.tuned, model)
        self._lens = Lens(model)
        self._tokenizer = tokenizer_of(model)

    def points(self, model: Any) -> Sequence[Point]:
        """The residual stream after each layer."""
        return residual_points(model)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Look through the lens at a layer."""
        asked = batch.once(("lens", "asked"), lambda: self._asked(batch))
        x = x if self._tuned is None else self._tuned.translate(x, point.layer)
        seen = self._lens.see(x, asked, ranks=1)
        layers: dict[int, Seen] = batch.once(("lens", "seen", id(self)), dict)
        layers[point.layer] = seen

    def finish(self, batch: Batch) -> None:
        """Hold each layer against the last, and keep means over each sample's tokens."""
        layers: dict[int, Seen] = batch.once(("lens", "seen", id(self)), dict)
        order = [layers[layer] for layer in sorted(layers)]
        device = order[-1].entropy.device
        tokens = torch.stack([one.tokens[..., 0].to(device) for one in order], 1)
        measured = torch.stack(
            [
                torch.stack([one.entropy.to(device) for one in order], 1),
                torch.stack([one.answer.to(device) for one in order], 1),
                (tokens == tokens[:, -1:]).float(),
            ],
            -1,
        ).double()  # [sample layer pos measure]
        answered = torch.tensor([bool(one.answers) for one in batch.samples] or [False])
        if not answered.all():
            unknown = ~answered.expand(len(measured)).to(device)
            measured[..., 1] = measured[..., 1].masked_fill(unknown[:, None, None], 0.0)
        real = batch.real.to(device)
        last = torch.zeros_like(real)
        at_last = real.long().mul(torch.arange(1, real.shape[1] + 1, device=device)).argmax(1)
        last[torch.arange(len(real), device=device), at_last] = True
        masks = {name: mask.to(device) for name, mask in batch.masks.items()} | {LAST: last}
        stacked = torch.stack(list(masks.values()), 1).double()
        counts = stacked.sum(-1)
        means = torch.einsum("slpm,sdp->sldm", measured, stacked)
        means = means / counts.clamp(min=1)[:, None, :, None]
        self.keep("values", means.float(), KEPT_SAMPLES)
        self.keep("counts", counts.long(), KEPT_SAMPLES)
        places = batch.places.to(device)
        for name, mask in masks.items():
            self.keep(f"tops/{name}", tokens.transpose(1, 2)[mask], KEPT_TOKENS, ids=places[mask])

    def result(self) -> LogitLens:
        """Means of each sample, and the tokens that were the most probable."""
        if self.samples == 0:
            raise ValueError("No sample has been seen, so the lens has shown nothing.")
        modalities = (*self.occurrences, LAST)
        tops = {name: self[f"tops/{name}"].cpu() for name in modalities}
        tops = {name: tokens for name, tokens in tops.items() if len(tokens)}
        known = sorted({token for tokens in tops.values() for token in tokens.flatten().tolist()})
        words = self._tokenizer.batch_decode([[token] for token in known]) if known else []
        return LogitLens(
            self["values"].cpu(),
            self["counts"].cpu(),
            modalities,
            tops,
            dict(zip(known, words, strict=True)),
            identity=self.identity,
        )

    def _asked(self, batch: Batch) -> Tensor:
        """The first token of each sample's answer, or 0 without one."""
        asked = []
        for sample in batch.samples:
            answer = sample.answers[0] if sample.answers else ""
            tokens = (
                self._tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else []
            )
            asked.append(tokens[0] if tokens else 0)
        return torch.tensor(asked or [0] * len(batch.ids))
