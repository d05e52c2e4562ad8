"""ImportanceScores: how specific each neuron is to each modality, over any number of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from miner_lens.models.identity import ModelIdentity, better_known
from miner_lens.models.result import Result
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring import select
from miner_lens.scoring.aggregate import merge_info, mix
from miner_lens.scoring.kernels import METRICS
from miner_lens.scoring.selection import Selection

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class ImportanceScores(Result):
    """Importance of every neuron to every modality, by each metric (MINER, stages 2 and 3).

    Scores over the same model add up: `a + b`, or `sum([a, b, c])`, is what mining all samples in
    one go would have given.

    Attributes:
        values: Scores, mean over samples; a sample without a modality counts as 0 there. MINER's
            are normalised to [0, 1]; of attribution they are signed, in nats.
        modalities: Names of the second axis.
        metrics: Names of the first axis.
        samples: Number of samples behind the means.
        occurrences: In how many of them each modality occurred. Left out, a modality occurred
            in all samples if any of its scores is not 0, and else in none.
        skipped: Number of samples that could not be used and are not counted in `samples`.
        data_sets: Over how many data sets, each counting the same, this is the `mean`. Scores of
            more than one do not add up: they are no mean over samples.
        means: Mean activation of each neuron at each modality's tokens, before normalisation,
            over the samples in which the modality occurred; 0 where it never did.
        identity: The model that was mined.
        info: What else to keep with the scores, as JSON can hold it: data, "attention" (its
            mode), versions. Scores of different attention modes do not add up; other entries
            that differ become a list of both.

    Raises:
        ValueError: If names, counts, means or identity do not fit the values.

    Example:
        >>> scores = ImportanceScores(torch.rand(5, 2, 3, 100), ["text", "image"], samples=8)
        >>> (scores + scores).samples
        16
        >>> scores.select(ratio=0.1)["image"]
        NeuronSet(15 of 300 neurons, 3 layers)
    """

    filename: ClassVar[str] = "scores.safetensors"

    values: Float[Tensor, "metric modality layer neuron"]
    modalities: Sequence[str]
    metrics: Sequence[str] = field(default=METRICS, kw_only=True)
    samples: int = field(default=1, kw_only=True)
    occurrences: Sequence[int] = field(default=(), kw_only=True)
    skipped: int = field(default=0, kw_only=True)
    data_sets: int = field(default=1, kw_only=True)
    means: Float[Tensor, "modality layer neuron"] | None = field(default=None, kw_only=True)
    identity: ModelIdentity | None = field(default=None, kw_only=True)
    info: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        fix = object.__setattr__
        fix(self, "values", self.values.detach().float().clone())
        fix(self, "modalities", tuple(self.modalities))
        fix(self, "metrics", tuple(self.metrics))
        fix(self, "info", dict(self.info))
        if self.means is not None:
            fix(self, "means", self.means.detach().float().clone())
        shape = tuple(self.values.shape)
        named = (len(self.metrics), len(self.modalities))
        if len(shape) != 4 or shape[:2] != named:
            raise ValueError(
                f"values has shape {list(shape)}; expected [metric modality layer neuron] with "
                f"{named[0]} metrics ({', '.join(self.metrics)}) and {named[1]} modalities "
                f"({', '.join(self.modalities)})."
            )
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"A modality is named twice: {', '.join(self.modalities)}.")
        if self.means is not None and tuple(self.means.shape) != shape[1:]:
            raise ValueError(
                f"means has shape {list(self.means.shape)}; expected [modality layer neuron] = "
                f"{list(shape[1:])}, as values."
            )
        model = self.identity
        if model is not None and (model.layers, model.neurons) != shape[2:]:
            raise ValueError(
                f"values has {shape[2]} layers x {shape[3]} neurons; {model.name} has "
                f"{model.layers} x {model.neurons}. Pass the identity of the model that was mined."
            )
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}: nothing was mined.")
        if not self.occurrences:
            scored = (self.values != 0).flatten(2).any(-1).any(0).tolist()
            fix(self, "occurrences", tuple(self.samples if any_ else 0 for any_ in scored))
        else:
            fix(self, "occurrences", tuple(int(count) for count in self.occurrences))
        if len(self.occurrences) != named[1] or not all(
            0 <= count <= self.samples for count in self.occurrences
        ):
            raise ValueError(
                f"occurrences is {list(self.occurrences)}; expected one count from 0 to "
                f"{self.samples} (samples) for each of {', '.join(self.modalities)}."
            )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.values.shape[2]

    @property
    def neurons(self) -> int:
        """Number of neurons in each layer; in the widest, where layers differ."""
        return self.values.shape[3]

    @property
    def exists(self) -> Bool[Tensor, "layer neuron"]:
        """True at the model's neurons: all, unless layers have different numbers of them."""
        if self.identity is None:
            return torch.ones(self.layers, self.neurons, dtype=torch.bool)
        return self.identity.exists

    @property
    def total(self) -> int:
        """How many neurons the model has."""
        return self.layers * self.neurons if self.identity is None else self.identity.total

    @property
    def site(self) -> str:
        """Where the neurons live: "llm" unless the model that was mined says otherwise."""
        return "llm" if self.identity is None else self.identity.site

    def __getitem__(self, modality: str) -> Float[Tensor, "metric layer neuron"]:
        if modality not in self.modalities:
            raise KeyError(f"There is no {modality!r} here; there are {', '.join(self.modalities)}")
        return self.values[:, self.modalities.index(modality)]

    def __contains__(self, modality: object) -> bool:
        return modality in self.modalities

    def __iter__(self) -> Iterator[str]:
        return iter(self.modalities)

    def __repr__(self) -> str:
        site = "" if self.site == "llm" else f", site={self.site!r}"
        shape = f"{self.layers} layers x {self.neurons} neurons{site}"
        model = "" if self.identity is None else f" of {self.identity.name}"
        name = max(len("modality"), *map(len, self.modalities), 0)
        head = f"{'modality':<{name}}  {'samples':>7}" + "".join(f"  {m:>6}" for m in self.metrics)
        widths = [max(6, len(metric)) for metric in self.metrics]
        means = (self.values.sum((2, 3)) / self.total).T.tolist()
        rows = [
            f"{modality:<{name}}  {count:>7}"
            + "".join(f"  {mean:{width}.4f}" for mean, width in zip(row, widths, strict=True))
            for modality, count, row in zip(self.modalities, self.occurrences, means, strict=True)
        ]
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        data_sets = f", data_sets={self.data_sets}" if self.data_sets > 1 else ""
        samples = f"samples={self.samples}{skipped}{data_sets}"
        title = f"ImportanceScores({shape}{model}, {samples}; mean score by metric)"
        return "\n".join([title, head, *rows])

    def __add__(self, other: ImportanceScores) -> ImportanceScores:
        if not isinstance(other, ImportanceScores):
            return NotImplemented
        self._check(other)
        for scores in (self, other):
            if scores.data_sets > 1:
                raise ValueError(
                    f"One of these scores is the mean of {scores.data_sets} data sets, in which "
                    "each counts the same, so it has no samples to weigh it by. Add up the scores "
                    "of each data set first, then use ImportanceScores.mean([...])."
                )
        if self.modalities != other.modalities:
            raise ValueError(
                f"Scores that add up need the same modalities; got {', '.join(self.modalities)} "
                f"and {', '.join(other.modalities)}. For different data sets, use "
                f"ImportanceScores.mean([...])."
            )
        samples = self.samples + other.samples
        pairs = list(zip(self.occurrences, other.occurrences, strict=True))
        means = None
        if self.means is not None and other.means is not None:
            counts = torch.tensor(pairs, dtype=torch.float64)
            means = mix([self.means, other.means], list(counts.T[:, :, None, None]))
        whole = [torch.tensor(float(scores.samples)) for scores in (self, other)]
        return ImportanceScores(
            mix([self.values, other.values], whole),
            self.modalities,
            metrics=self.metrics,
            samples=samples,
            occurrences=[a + b for a, b in pairs],
            skipped=self.skipped + other.skipped,
            means=means,
            identity=better_known(self.identity, other.identity),
            info=merge_info(self.info, other.info),
        )

    def __radd__(self, other: object) -> ImportanceScores:
        """So that `sum` works, which begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    @classmethod
    def mean(cls, scores: Iterable[ImportanceScores]) -> ImportanceScores:
        """Scores over several data sets: each modality's mean over those in which it occurs.

        Every data set counts the same, however many samples it has (MINER, stage 3). The data
        sets may have different modalities; the result has all of them.

        Raises:
            ValueError: If there are none, they are of different models, metrics or attention
                modes, or one of several is such a mean already.
            TypeError: If they are no scores.

        Example:
            >>> pictures = ImportanceScores(torch.full((5, 1, 1, 1), 0.5), ["image"])
            >>> sounds = ImportanceScores(torch.full((5, 1, 1, 1), 0.2), ["audio"])
            >>> ImportanceScores.mean([pictures, sounds])["image"].mean().item()
            0.5
        """
        sets = list(scores)
        if not sets:
            raise ValueError("ImportanceScores.mean needs the scores of at least one data set.")
        for one in sets:
            if not isinstance(one, ImportanceScores):
                raise TypeError(
                    "ImportanceScores.mean needs a list of ImportanceScores, one for each data "
                    f"set; it has {type(one).__name__}."
                )
            if one.data_sets > 1 and len(sets) > 1:
                raise ValueError(
                    f"One of these scores is the mean of {one.data_sets} data sets already, and "
                    "those would count less than the others. Give the scores of all data sets at "
                    "once: ImportanceScores.mean([a, b, c])."
                )
        for one, other in ((a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]):
            one._check(other)
        modalities = list(dict.fromkeys(name for one in sets for name in one.modalities))
        values, means, occurrences = [], [], []
        with_means = all(one.means is not None for one in sets)
        for modality in modalities:
            having = [(s, s.modalities.index(modality)) for s in sets if modality in s.modalities]
            occurring = [(s, i) for s, i in having if s.occurrences[i]] or having
            equal = [torch.tensor(1.0)] * len(occurring)
            values.append(mix([s.values[:, i] for s, i in occurring], equal))
            if with_means:
                rows = [s.means[i] for s, i in occurring if s.means is not None]
                means.append(mix(rows, equal))
            occurrences.append(sum(s.occurrences[i] for s, i in having))
        info: dict[str, Any] = {}
        for one in sets:
            info = merge_info(info, one.info)
        return cls(
            torch.stack(values, 1),
            modalities,
            metrics=sets[0].metrics,
            samples=sum(one.samples for one in sets),
            occurrences=occurrences,
            skipped=sum(one.skipped for one in sets),
            data_sets=sum(one.data_sets for one in sets),
            means=torch.stack(means) if with_means else None,
            identity=reduce(better_known, [one.identity for one in sets]),
            info=info,
        )

    def select(
        self,
        ratio: float = 0.02,
        strategy: str = "LA_MU",
        weights: Sequence[float] | Mapping[str, float] | None = None,
        split: str | None = None,
        seed: int = 0,
    ) -> Selection:
        """Modality-specific neurons: for each modality, a set of them (MINER, stage 4).

        Args:
            ratio: Share of the model's neurons to select, over all modalities.
            strategy: "adaptive", "LA_MU" (default), "LU_MA", "uniform", "random", "contrastive",
                "lape", or one that an installed package names; see `miner_lens.scoring.select`.
                "random" gives a single set, named random. All but MINER's five are given each
                modality's mean over the samples in which it occurs (of a single data set).
            weights: Weight of each metric, in order or as a mapping; default 0, 0.25, 0.25,
                0.5, 0 of MINER's five, and else as `miner_lens.scoring.select.default_weights`.
            split: Which modalities to tell apart: "special_text_separate" (the default where
                there are scores of text), "special_text_as_one" or "prompt"; of these, the ones
                that occur in the data.
            seed: Seed of "random".

        Raises:
            ValueError: If an argument is unknown or out of range, none of the split's
                modalities occurs, the ratio leaves a modality or layer without a neuron, or the
                scores contain NaN.
        """
        counts = dict(zip(self.modalities, self.occurrences, strict=True))
        if split is None:
            fitting = (name for name, parts in select.SPLITS.items() if counts.get(parts[0]))
            split = next(fitting, "special_text_separate")
        if split not in select.SPLITS:
            raise ValueError(f"There is no split {split!r}; there are {', '.join(select.SPLITS)}.")
        names = [name for name in select.SPLITS[split] if counts.get(name)]
        if not names:
            occurring = [name for name, count in counts.items() if count]
            raise ValueError(
                f"The split {split} needs one of {', '.join(select.SPLITS[split])}; the data has "
                f"{', '.join(occurring) or 'no modality at all'}. Choose another split, or mine "
                f"data that has them."
            )
        chosen = [self.modalities.index(name) for name in names]
        if weights is None:
            weights = select.default_weights(self.metrics)
        combined = select.combine(self.values[:, chosen], weights, self.metrics, names)
        if strategy not in select.PUBLISHED and self.data_sets == 1:
            # Absent counts as 0, so a modality of half the samples has half the score: no measure
            # to hold modalities against each other by.
            shares = [self.occurrences[place] / self.samples for place in chosen]
            combined = combined / combined.new_tensor(shares)[:, None, None]
        masks = select.select(combined, ratio, strategy, seed, self.exists)
        means = self._overall_means()
        keys = ["random"] if strategy == "random" else names
        return Selection(
            (key, NeuronSet.from_mask(mask, self.identity, means))
            for key, mask in zip(keys, masks, strict=True)
        )

    def to_frame(self) -> pd.DataFrame:
        """A long table of the columns site, metric, modality, layer, neuron and score."""
        import pandas as pd

        axes = [self.metrics, self.modalities, range(self.layers), range(self.neurons)]
        index = pd.MultiIndex.from_product(axes, names=["metric", "modality", "layer", "neuron"])
        values = {"score": self.values.cpu().flatten().numpy()}
        table = pd.DataFrame(values, index=index).reset_index()
        table.insert(0, "site", self.site)
        if self.total < self.layers * self.neurons:
            there = self.exists.expand(self.values.shape).flatten().numpy()
            table = table[there].reset_index(drop=True)
        return table

    def overview(self) -> pd.DataFrame:
        """Of each modality, the samples that have it and its mean score by each metric."""
        import pandas as pd

        means = (self.values.sum((2, 3)) / self.total).T.cpu().numpy()
        table = pd.DataFrame(means, list(self.modalities), list(self.metrics))
        table.insert(0, "samples", list(self.occurrences))
        return table.rename_axis("modality")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the scores holds."""
        metadata = {
            "modalities": self.modalities,
            "metrics": self.metrics,
            "layers": self.layers,
            "neurons": self.neurons,
            "samples": self.samples,
            "occurrences": self.occurrences,
            "skipped": self.skipped,
            "data_sets": self.data_sets,
            "info": self.info,
        }
        return {"values": self.values, "means": self.means}, metadata

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> ImportanceScores:
        """The scores that a file holds."""
        return cls(
            tensors["values"],
            metadata["modalities"],
            metrics=metadata["metrics"],
            samples=metadata["samples"],
            occurrences=metadata["occurrences"],
            skipped=metadata["skipped"],
            data_sets=metadata.get("data_sets", 1),
            means=tensors.get("means"),
            identity=identity,
            info=metadata["info"],
        )

    def _overall_means(self) -> Float[Tensor, "layer neuron"] | None:
        """Each neuron's mean over all tokens that it sees, for the ablation that writes means."""
        if self.means is None:
            return None
        if "prompt" in self.modalities:
            prompt = self.modalities.index("prompt")
            return self.means[prompt] if self.occurrences[prompt] else None
        if self.site == "llm":
            return None
        # In a tower there is one row for each medium, and no medium's rows are another's.
        weights = [torch.tensor(float(count)) for count in self.occurrences]
        return mix(list(self.means), weights)

    def _check(self, other: ImportanceScores) -> None:
        """Refuse scores that cannot be averaged with these."""
        if self.identity is not None and other.identity is not None:
            self.identity.check(other.identity, "One ImportanceScores")
        if self.values.shape[2:] != other.values.shape[2:]:
            raise ValueError(
                f"Scores of different models do not mix: {self.layers} layers x {self.neurons} "
                f"neurons and {other.layers} x {other.neurons}."
            )
        if self.metrics != other.metrics:
            raise ValueError(
                f"Scores of different metrics do not mix: {', '.join(self.metrics)} and "
                f"{', '.join(other.metrics)}."
            )
        modes = [scores.info.get("attention") for scores in (self, other)]
        if None not in modes and modes[0] != modes[1]:
            raise ValueError(
                f"Scores of different attention modes do not mix: {modes[0]} and {modes[1]}. "
                f"Mine both with the same attention=."
            )
