"""Integrated gradients of neurons: attribution along the way from switched off to as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miner_lens.analyzers.attribution import AttributionAnalyzer
from miner_lens.models.forcing import logprob
from miner_lens.models.points import activation_points
from miner_lens.running.batch import Batch
from miner_lens.running.hooks import Hook, Running
from miner_lens.running.passes import Objective
from miner_lens.running.run import Data, run
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.select import SPLITS

METRIC = "integrated"
# Gradients are taken at so many points of each stretch of the way.
POINTS = 4
# Of what is lost in all, most is lost next to 0, where log-probabilities fall; so points lie denser
# there, at cubes of what would be even.
POWER = 3
# The sum may miss the difference by this share; half of it is aimed at.
TOLERANCE = 0.01
LEAST = 1e-4  # or by this, which is rounding


class Completeness(NamedTuple):
    """Whether attributions add up to what they should.

    Attributes:
        sum: Of all neurons' attributions, in units of the objective, mean over samples.
        difference: What the objective loses when all neurons are off at the modality's tokens.
        gap: The share of the difference by which the sum misses it.
        steps: At how many points gradients were taken.
    """

    sum: float
    difference: float
    gap: float
    steps: int


@dataclass(frozen=True)
class Dimmed:
    """Hooks that multiply the X of all neurons, at a modality's tokens of the prompt, by a number.

    Attributes:
        modality: The modality; in a tower, the only one that its rows have.
        by: The number.
        site: Where the neurons live.
    """

    modality: str
    by: float
    site: str

    def hooks(self, model: Any, running: Running) -> list[Hook]:
        """At every layer of the site."""

        def dim(x: Tensor, hook: Any) -> Tensor | None:
            batch = running()
            if batch is None:
                return None
            if self.site != "llm":
                return x * self.by
            mask = batch.masks[self.modality].to(x.device)[..., None]
            return torch.where(mask, x * self.by, x)

        return [(point.name, dim) for point in activation_points(model, self.site)]


class AlongPath(AttributionAnalyzer):
    """Attribution at one point of the way, and the objective there.

    Args:
        modality: At whose tokens neurons are dimmed.
        by: What they are multiplied by.
        data: A name of the data set.
        site: Where the neurons live.
        objective: What `run` is given.
    """

    def __init__(
        self,
        modality: str,
        by: float,
        data: str | None = None,
        site: str = "llm",
        objective: Objective = "answer",
    ) -> None:
        super().__init__(data, site)
        self.modality, self.by, self.objective = modality, by, objective

    @property
    def settings(self) -> dict[str, Any]:
        """What two analyzers must share to be merged or continued; not the name of the data."""
        return {"site": self.site, "modality": self.modality, "by": self.by}

    def needs(self) -> list[Dimmed]:
        """The dimming, which comes before what is read."""
        return [] if self.by == 1 else [Dimmed(self.modality, self.by, self.site)]

    def finish(self, batch: Batch) -> None:
        """Note the objective."""
        logits = batch.output.logits
        if callable(self.objective):
            value = self.objective(logits, batch).sum()
        else:
            pairs = zip(logits, batch.answers, strict=True)
            scored = [logprob(row[-len(answer) - 1 : -1], answer) for row, answer in pairs]
            value = torch.stack(scored).sum()
        self.sum("objective", value.double())

    @property
    def mean_objective(self) -> float:
        """The objective's mean over samples."""
        return float(self["objective"]) / self.samples


@dataclass(frozen=True)
class Stretch:
    """A part of the way, and what its points give.

    Attributes:
        begin: Where it begins, before taking the power.
        end: Where it ends.
        lost: What the objective gains from its begin to its end.
        effects: The integral over it, [layer neuron].
    """

    begin: float
    end: float
    lost: float
    effects: Tensor

    @property
    def gap(self) -> float:
        """By how much the integral misses what it should add up to."""
        return abs(float(self.effects.sum()) - self.lost)


def integrated_gradients(
    model: Any,
    data: Data,
    steps: int = 64,
    objective: Objective = "answer",
    modalities: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    site: str = "llm",
    **options: Any,
) -> ImportanceScores:
    """Attribute to each neuron its part of what switching all neurons off together would cost.

    At the tokens of one modality all neurons of the site are multiplied by a number that goes from
    0 (off) to 1 (as they are), and of each neuron the first-order effect of `attribute` is
    integrated over it (Sundararajan et al. 2017, arXiv 1703.01365, with all neurons off as the
    baseline and the scale of each as its coordinate). The attributions of a modality add up to what
    the objective loses when all neurons are off at its tokens: `info["completeness"]` has, by
    modality, the `Completeness` that was reached.

    The way is cut where the sum misses what it should add up to, until it misses no more than half
    a percent of the whole or `steps` are used up; a warning says where it then misses more than
    1 %. Each step is a run over the data with a backward pass.

    Args:
        model: A `TransformerBridge`.
        data: Samples with answers, which can be gone through several times.
        steps: At how many points to take gradients at most, for each modality; at least 4.
        objective: `"answer"`, or a function of the logits and the batch.
        modalities: At whose tokens; by default those of text, special and media that occur.
        checkpoint: A folder from which a run that was stopped continues.
        site: Where the neurons live: `"llm"`, or a tower of the model.
        options: Others of `ml.run`, such as `batch_size`.

    Returns:
        Scores [metric modality layer neuron] with the one metric `integrated`, in units of the
        objective (nats), mean over samples.

    Raises:
        ValueError: `steps` is below 4, a modality does not occur, or several occur in a tower.
        TypeError: The data can be gone through only once.

    Example:
        scores = ml.integrated_gradients(model, data, batch_size=8)
        scores.info["completeness"]["image"]
    """
    if steps < POINTS:
        raise ValueError(f"steps must be at least {POINTS}, not {steps}.")
    if not isinstance(data, Mapping) and iter(data) is data:
        raise TypeError(
            "Integrated gradients go through the data many times, and this is an iterator. Give a "
            "list, list(data)."
        )

    def at(modality: str, by: float) -> tuple[float, ImportanceScores]:
        name = getattr(data, "name", None)
        analyzer = AlongPath(modality, by, name, site, objective)
        here = None if checkpoint is None else Path(checkpoint, f"{modality}-{by:.6f}")
        chosen = options | {"objective": objective, "checkpoint": here}
        scores: ImportanceScores = run(model, data, analyzer, **chosen)
        return analyzer.mean_objective, scores

    whole, intact = at("all", 1.0)
    counts = dict(zip(intact.modalities, intact.occurrences, strict=True))
    modalities = _chosen(modalities, counts, site)
    values, reached = [], {}
    for modality in modalities:
        effects, reached[modality] = _along(partial(at, modality), modality, whole, steps)
        values.append(effects.float())
        _warn(modality, reached[modality])
    places = [intact.modalities.index(modality) for modality in modalities]
    return replace(
        intact,
        values=torch.stack(values, 1),
        modalities=tuple(modalities),
        metrics=(METRIC,),
        occurrences=tuple(counts[modality] for modality in modalities),
        means=None if intact.means is None else intact.means[places],
        info={**intact.info, "completeness": {m: one._asdict() for m, one in reached.items()}},
    )


def _along(
    at: Callable[[float], tuple[float, ImportanceScores]], modality: str, whole: float, steps: int
) -> tuple[Tensor, Completeness]:
    """Effects [1 layer neuron] at a modality's tokens, and whether they add up."""
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    nodes, weights = (nodes + 1) / 2, weights / 2
    ends = {0.0: at(0.0)[0], 1.0: whole}
    difference = whole - ends[0.0]

    def stretch(begin: float, end: float) -> Stretch:
        effects: Any = 0.0
        for place, weight in zip(begin + (end - begin) * nodes, weights, strict=True):
            by = float(place**POWER)
            _, scores = at(by)
            values = scores.values[:, list(scores.modalities).index(modality)]
            speed = (end - begin) * POWER * place ** (POWER - 1)
            # The effect is of X as it is scaled: `by` times that of the scale itself.
            effects = effects + values.double() * float(weight * speed / by)
        return Stretch(begin, end, ends[end] - ends[begin], effects)

    stretches, used = [stretch(0.0, 1.0)], POINTS
    while used + 2 * POINTS <= steps:
        if sum(one.gap for one in stretches) <= TOLERANCE / 2 * abs(difference) + LEAST / 2:
            break
        worst = max(stretches, key=lambda one: one.gap)
        middle = (worst.begin + worst.end) / 2
        ends[middle] = at(middle**POWER)[0]
        stretches.remove(worst)
        stretches += [stretch(worst.begin, middle), stretch(middle, worst.end)]
        used += 2 * POINTS
    effects = torch.stack([one.effects for one in stretches]).sum(0)
    found = float(effects.sum())
    gap = abs(found - difference) / max(abs(difference), 1e-12)
    return effects, Completeness(found, difference, gap, used)


def _chosen(modalities: Sequence[str] | None, counts: Mapping[str, int], site: str) -> list[str]:
    """The modalities to go through, each of which occurs."""
    occurring = [name for name, count in counts.items() if count]
    if modalities is None:
        modalities = [name for name in SPLITS["special_text_separate"] if counts.get(name)]
    absent = [name for name in modalities if not counts.get(name)]
    if absent or not modalities:
        raise ValueError(
            f"No sample has tokens of {absent[0] if absent else 'any modality'!r}; the data has "
            f"{', '.join(occurring)}."
        )
    if site != "llm" and len(occurring) > 1:
        raise ValueError(
            f"The data has {' and '.join(occurring)} in site {site!r}, whose rows are not told "
            "apart here. Give data of one medium."
        )
    return list(modalities)


def _warn(modality: str, reached: Completeness) -> None:
    if reached.gap > TOLERANCE and abs(reached.sum - reached.difference) > LEAST:
        warnings.warn(
            f"Integrated gradients at {modality} tokens add up to {reached.sum:.4g}, and switching "
            f"all neurons off there costs {reached.difference:.4g}: with {reached.steps} steps the "
            f"sum misses {reached.gap:.1%} of it. Give more steps.",
            stacklevel=3,
        )
