"""HiddenStates: where each modality's tokens lie in each layer, and whether modalities converge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from miner_lens.models.identity import ModelIdentity
from miner_lens.models.result import Result
from miner_lens.scoring import convergence

if TYPE_CHECKING:
    import pandas as pd

# The least and the greatest that each can be; an interval ends there at the latest.
RANGES = {
    "cka": (-np.inf, 1.0),
    "distance": (0.0, np.inf),
    "separability": (0.0, 1.0),
    "dimension": (1.0, np.inf),
}
MEASURES = tuple(RANGES)
LEAST = 4  # samples


@dataclass(frozen=True, eq=False, repr=False)
class HiddenStates(Result):
    """Hidden states of some samples, by modality and layer.

    Attributes:
        means: By modality, the mean over each sample's tokens.
        drawn: By modality, tokens drawn from each sample with replacement.
        samples: By modality, the places of these samples in the data.
        identity: The model.
    """

    filename: ClassVar[str] = "hidden-states.safetensors"

    means: Mapping[str, Float[Tensor, "sample layer d_model"]]
    drawn: Mapping[str, Float[Tensor, "sample layer token d_model"]]
    samples: Mapping[str, Int[Tensor, " sample"]]
    identity: ModelIdentity | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that occurred."""
        return tuple(self.means)

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return int(next(iter(self.means.values())).shape[1])

    def curves(
        self,
        measures: Sequence[str] = MEASURES,
        pairs: Sequence[tuple[str, str]] | None = None,
        shuffles: int = 20,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Each measure in each layer, with an interval over samples and a shuffled null.

        - `cka`: of the two modalities' means in the same samples. Null: samples are paired anew.
        - `distance`: of the centroids against the spread. Null: within each sample, which tokens
          are whose is shuffled.
        - `separability`: the share of tokens that a linear classifier assigns right in samples that
          it has not seen. Null: as for distance.
        - `dimension`: the participation ratio of each modality by itself (`other` is empty). Null:
          each coordinate is shuffled over tokens by itself.

        Args:
            measures: Some of these.
            pairs: Of modalities; by default all that occur together in at least four samples.
            shuffles: Of the null.
            seed: Of the shuffles.

        Returns:
            A table of the columns modality, other, measure, layer, samples, mean (the value), low
            and high (95 % jackknife interval, which ends where the measure's range does), null,
            null_low and null_high (mean, least and greatest of the shuffles).

        Raises:
            ValueError: A measure or modality is unknown, or a pair shares fewer than four samples.
            ImportError: scipy or scikit-learn is missing.
        """
        import pandas as pd

        if unknown := sorted(set(measures) - set(MEASURES)):
            raise ValueError(f"There is no {unknown[0]!r}; there are {', '.join(MEASURES)}.")
        if pairs is None:
            every = combinations(self.modalities, 2)
            pairs = [pair for pair in every if len(self._shared(*pair)[0]) >= LEAST]
        rng, rows = np.random.default_rng(seed), []
        for one, other, measure in self._asked(measures, pairs):
            for layer in range(self.layers):
                value, null = self._measure(measure, one, other, layer)
                found = convergence.jackknife(value, self._count(one, other))
                low, high = np.clip([found.low, found.high], *RANGES[measure])
                shuffled = [null(rng) for _ in range(shuffles)]
                about = (one, other, measure, layer, self._count(one, other))
                least, greatest = min(shuffled), max(shuffled)
                null_of_it = (float(np.mean(shuffled)), least, greatest)
                rows.append((*about, found.value, float(low), float(high), *null_of_it))
        names = ["modality", "other", "measure", "layer", "samples", "mean", "low", "high"]
        return pd.DataFrame(rows, columns=[*names, "null", "null_low", "null_high"])

    def embed(self, layer: int, method: str = "tsne", seed: int = 0) -> pd.DataFrame:
        """Tokens of a layer in two dimensions, to be looked at and not to be measured.

        Args:
            layer: The layer.
            method: `"tsne"`, by scikit-learn, or `"umap"`, by umap-learn.
            seed: Of the method.

        Returns:
            A table of the columns modality, sample, x and y.

        Raises:
            ValueError: The method is unknown.
            ImportError: The library is missing.
        """
        import pandas as pd

        states = np.concatenate([self._tokens(name, layer) for name in self.modalities])
        places = _embedder(method, seed, len(states)).fit_transform(states)
        table = pd.DataFrame(places, columns=["x", "y"])
        kept = [(name, s) for name in self.modalities for s in self.samples[name].tolist()]
        drawn = next(iter(self.drawn.values())).shape[2]
        table.insert(0, "modality", np.repeat([name for name, _ in kept], drawn))
        table.insert(1, "sample", np.repeat([sample for _, sample in kept], drawn))
        return table

    def __repr__(self) -> str:
        lines = [f"HiddenStates({self.layers} layers)"]
        for name, states in self.means.items():
            lines.append(f"{name:<12} {len(states):>5} samples, {states.shape[-1]} dimensions")
        return "\n".join(lines)

    def overview(self) -> pd.DataFrame:
        """Of how many samples there are states, by modality."""
        import pandas as pd

        counts = {"samples": [len(states) for states in self.means.values()]}
        return pd.DataFrame(counts, list(self.means)).rename_axis("modality")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the states holds."""
        parts = {"means": self.means, "drawn": self.drawn, "samples": self.samples}
        tensors: dict[str, Tensor | None] = {
            f"{part}/{name}": tensor
            for part, some in parts.items()
            for name, tensor in some.items()
        }
        return tensors, {"modalities": self.modalities}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> HiddenStates:
        """The states that a file holds."""
        means, drawn, samples = (
            {name: tensors[f"{part}/{name}"] for name in metadata["modalities"]}
            for part in ("means", "drawn", "samples")
        )
        return cls(means, drawn, samples, identity)

    def _asked(
        self, measures: Sequence[str], pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[str, str, str]]:
        for pair in pairs:
            for name in pair:
                if name not in self.means:
                    known = ", ".join(self.modalities)
                    raise ValueError(f"There is no modality {name!r} here; there are {known}.")
            if len(self._shared(*pair)[0]) < LEAST:
                raise ValueError(
                    f"{pair[0]} and {pair[1]} occur together in {len(self._shared(*pair)[0])} "
                    f"samples; at least {LEAST} are needed."
                )
            yield from ((*pair, measure) for measure in measures if measure != "dimension")
        if "dimension" in measures:
            enough = (name for name in self.modalities if len(self.means[name]) >= LEAST)
            yield from ((name, "", "dimension") for name in enough)

    def _shared(self, one: str, other: str) -> tuple[Any, Any]:
        """Places of the samples that both have, in each."""
        a, b = self.samples[one].numpy(), self.samples[other].numpy()
        _, first, second = np.intersect1d(a, b, return_indices=True)
        return first, second

    def _count(self, one: str, other: str) -> int:
        return len(self._shared(one, other)[0]) if other else len(self.means[one])

    def _tokens(self, name: str, layer: int) -> Any:
        """[token d_model], sample by sample."""
        return self.drawn[name][:, layer].flatten(0, 1).double().numpy()

    def _measure(
        self, measure: str, one: str, other: str, layer: int
    ) -> tuple[Callable[[Any], float], Callable[[np.random.Generator], float]]:
        """A measure of some samples, and of a shuffle of all."""
        if measure == "dimension":
            cloud = self.drawn[one][:, layer].double().numpy()

            def shuffled_dimension(rng: np.random.Generator) -> float:
                rows = rng.permuted(cloud.reshape(-1, cloud.shape[-1]), axis=0)
                return convergence.effective_dimension(rows)

            return (
                lambda some: convergence.effective_dimension(
                    cloud[some].reshape(-1, cloud.shape[-1])
                ),
                shuffled_dimension,
            )
        first, second = self._shared(one, other)
        if measure == "cka":
            x = self.means[one][first, layer].double().numpy()
            y = self.means[other][second, layer].double().numpy()
            return (
                lambda some: convergence.cka(x[some], y[some]),
                lambda rng: convergence.cka(x, y[rng.permutation(len(y))]),
            )
        # [sample modality token d_model]
        both = torch.stack([self.drawn[one][first, layer], self.drawn[other][second, layer]], 1)
        clouds = both.double().numpy()
        of = _distance if measure == "distance" else _separability(clouds)

        def shuffled(rng: np.random.Generator) -> float:
            tokens = clouds.reshape(len(clouds), -1, clouds.shape[-1])
            mixed = np.stack([rng.permutation(some) for some in tokens]).reshape(clouds.shape)
            chosen = of if measure == "distance" else _separability(mixed)
            return chosen(mixed, np.arange(len(mixed)))

        return lambda some: of(clouds, some), shuffled


def _distance(clouds: Any, some: Any) -> float:
    one, other = (clouds[some, n].reshape(-1, clouds.shape[-1]) for n in (0, 1))
    return convergence.centroid_distance(one, other)


def _separability(clouds: Any) -> Callable[[Any, Any], float]:
    """The share of some samples' tokens that are told right, by classifiers fitted once."""
    samples, _, tokens, width = clouds.shape
    labels = np.tile(np.repeat([0, 1], tokens), samples)
    groups = np.repeat(np.arange(samples), 2 * tokens)
    right = convergence.held_out(clouds.reshape(-1, width), labels, groups).reshape(samples, -1)
    return lambda _, some: float(right[some].mean())


def _embedder(method: str, seed: int, rows: int) -> Any:
    if method == "tsne":
        try:
            from sklearn.manifold import TSNE
        except ImportError as error:
            raise ImportError("t-SNE needs scikit-learn: pip install miner-lens[demo]") from error
        return TSNE(random_state=seed, init="pca", perplexity=min(30.0, (rows - 1) / 3))
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise ImportError("UMAP needs umap-learn: pip install umap-learn") from error
        return UMAP(random_state=seed)
    raise ValueError(f"There is no method {method!r}; there are tsne and umap.")
