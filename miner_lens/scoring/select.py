"""Stage 4: which neurons are specific to which modality, from their scores.

Pure functions on tensors. Where scores are equal, the lowest (modality,) layer and neuron
come first, so that a selection does not depend on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from miner_lens import installed
from miner_lens.models.precision import full_precision
from miner_lens.neurons.draw import random
from miner_lens.scoring.kernels import METRICS

# Where packages name strategies of their own: functions as those below.
ENTRY_POINTS = "miner_lens.strategies"

# Those that look at all layers together, for which neurons might as well be in one.
_ACROSS_LAYERS = ("adaptive", "LA_MU", "contrastive", "lape")

# MINER's own.
PUBLISHED = ("adaptive", "LA_MU", "LU_MA", "uniform", "random")
DEFAULT_WEIGHTS = (0.0, 0.25, 0.25, 0.5, 0.0)
SPLITS = {
    "special_text_separate": ("text", "special", "image", "video", "audio"),
    "special_text_as_one": ("special_text", "image", "video", "audio"),
    "prompt": ("prompt",),
}


def default_weights(metrics: Sequence[str]) -> dict[str, float]:
    """What the metrics weigh in a selection where nothing else is said.

    MINER's weights (0.25 mean, 0.25 max, 0.5 attn_k). Where attn_k was not scored its half goes to
    `attended`, or else to the mean, from which it hardly differs (docs/method.md). Of other
    metrics, such as `attribution`, the first alone counts.

    Example:
        >>> default_weights(("prob", "mean", "max"))
        {'mean': 0.75, 'max': 0.25}
    """
    weights = dict(zip(METRICS, DEFAULT_WEIGHTS, strict=True))
    if "attn_k" not in metrics:
        heir = "attended" if "attended" in metrics else "mean"
        weights[heir] = weights.get(heir, 0.0) + weights.pop("attn_k")
    known = {metric: weights[metric] for metric in metrics if weights.get(metric)}
    return known or {metrics[0]: 1.0}


@full_precision()
def combine(
    values: Float[Tensor, "metric modality layer neuron"],
    weights: Sequence[float] | Mapping[str, float] = DEFAULT_WEIGHTS,
    metrics: Sequence[str] = METRICS,
    modalities: Sequence[str] = (),
) -> Float[Tensor, "modality layer neuron"]:
    """Weighted sum of the metrics.

    Args:
        values: Scores.
        weights: One weight for each metric in order, or a mapping from metric to weight, in
            which metrics left out weigh 0.
        metrics: Names of the metrics.
        modalities: Names of the modalities, for the error message.

    Raises:
        ValueError: If a weight is missing, unknown, negative or not a number, or all are 0; or
            if a score that counts is NaN or infinite.

    Example:
        >>> combine(torch.ones(5, 1, 1, 1), {"prob": 1.0, "max": 2.0}).item()
        3.0
    """
    if isinstance(weights, Mapping):
        unknown = set(weights) - set(metrics)
        if unknown:
            raise ValueError(
                f"There is no metric {_list(sorted(unknown))}; there are {_list(metrics)}."
            )
        weights = [weights.get(metric, 0.0) for metric in metrics]
    if len(weights) != len(metrics):
        raise ValueError(
            f"Got {len(weights)} weights for {len(metrics)} metrics ({_list(metrics)}): give one "
            f"each, or a mapping such as {{'mean': 1}}."
        )
    weights = [float(weight) for weight in weights]
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ValueError(
            f"Weights must be 0 or more, finite, and not all 0; got {weights} for {_list(metrics)}."
        )
    counted = [metric for metric, weight in enumerate(weights) if weight]
    used = values[counted]
    if not used.isfinite().all():
        metric, modality, layer, neuron = (~used.isfinite()).nonzero()[0].tolist()
        name = modalities[modality] if modalities else modality
        raise ValueError(
            f"Scores contain NaN or infinity, first at metric {metrics[counted[metric]]}, modality "
            f"{name}, layer {layer}, neuron {neuron}. Mine again in fp32 or bf16, or "
            f"leave out the samples that overflow."
        )
    kept = used.new_tensor([weights[metric] for metric in counted])
    return einsum(used, kept, "metric modality layer neuron, metric -> modality layer neuron")


def adaptive(
    scores: Float[Tensor, "modality layer neuron"], k: int
) -> Bool[Tensor, "modality layer neuron"]:
    """The top `k` of the sum over modalities, each given to the modality it scores highest in."""
    modality = torch.arange(len(scores), device=scores.device)[:, None, None]
    return _top(scores.sum(0), k) & (scores.argmax(0) == modality)


def la_mu(
    scores: Float[Tensor, "modality layer neuron"], k: int
) -> Bool[Tensor, "modality layer neuron"]:
    """Layers adaptive, modalities uniform: the top `k // modalities` of each modality."""
    return torch.stack([_top(modality, k // len(scores)) for modality in scores])


def lu_ma(
    scores: Float[Tensor, "modality layer neuron"], k: int
) -> Bool[Tensor, "modality layer neuron"]:
    """Layers uniform, modalities adaptive: per layer the top `k // layers` (modality, neuron)."""
    layers = scores.shape[1]
    return torch.stack([_top(layer, k // layers) for layer in scores.unbind(1)], 1)


def uniform(
    scores: Float[Tensor, "modality layer neuron"], k: int
) -> Bool[Tensor, "modality layer neuron"]:
    """The top `k // (modalities * layers)` of each modality in each layer."""
    each = k // (scores.shape[0] * scores.shape[1])
    return torch.stack([lu_ma(modality[None], each * scores.shape[1])[0] for modality in scores])


def contrastive(
    scores: Float[Tensor, "modality layer neuron"], k: int
) -> Bool[Tensor, "modality layer neuron"]:
    """The top `k // modalities` of each modality by its score minus the best other modality's.

    What scores high in all modalities, as a neuron does that is merely strong, comes last. With a
    single modality it is `la_mu`.
    """
    if len(scores) == 1:
        return la_mu(scores, k)
    first, second = scores.topk(2, dim=0).values
    modality = torch.arange(len(scores), device=scores.device)[:, None, None]
    return la_mu(scores - torch.where(scores.argmax(0) == modality, second, first), k)


def lape(
    scores: Float[Tensor, "modality layer neuron"], k: int
) -> Bool[Tensor, "modality layer neuron"]:
    """The `k` neurons whose score is spread over the fewest modalities, by its entropy.

    LAPE (Tang et al. 2024, arXiv 2402.16438), there of activation probabilities
    by language. A score is high if it is among the top 5 % of all (modality, layer, neuron), those
    that equal the last of them included: unlike in the published code, so that some are high where
    more have the highest score of all. Only neurons with a high score in some modality are taken,
    and each belongs to all modalities in which it has one; so there may be fewer than `k`, and
    modalities get what falls to them. Negative scores count as 0.
    """
    scores = scores.clamp(min=0)
    bar = scores.flatten().kthvalue(max(1, round(0.95 * scores.numel()))).values
    high = (scores >= bar) & (scores > 0)
    shares = scores / scores.sum(0).clamp(min=torch.finfo(scores.dtype).tiny)
    entropy = torch.special.entr(shares).sum(0)
    return high & _top(-entropy.masked_fill(~high.any(0), torch.inf), k)


STRATEGIES: dict[str, Callable[..., Tensor]] = {
    "adaptive": adaptive,
    "LA_MU": la_mu,
    "LU_MA": lu_ma,
    "uniform": uniform,
    "random": random,
    "contrastive": contrastive,
    "lape": lape,
}


def find(strategy: str) -> Callable[..., Tensor]:
    """A strategy by its name: one of `STRATEGIES`, or one that an installed package names.

    Such a package has, in the entry-point group `miner_lens.strategies`, functions of scores
    [modality layer neuron] and K that return which neurons belong to which modality, a boolean
    tensor of the same shape.

    Raises:
        ValueError: There is no strategy of that name.

    Example:
        >>> find("LA_MU") is la_mu
        True
    """
    return installed.find("strategy", strategy, STRATEGIES, ENTRY_POINTS)


def budget(
    ratio: float,
    strategy: str,
    modalities: int,
    layers: int,
    neurons: int,
    total: int | None = None,
) -> int:
    """K, the number of neurons that a ratio stands for: `int(ratio * layers * neurons)`.

    Args:
        ratio: Share of the neurons.
        strategy: Its name.
        modalities: How many there are.
        layers: How many there are.
        neurons: Of each layer, or of the widest.
        total: How many neurons there are, where layers have different numbers of them.

    Raises:
        ValueError: If the strategy is unknown, the ratio lies outside (0, 1], or K leaves some
            modality or layer that the strategy treats apart without a neuron.

    Example:
        >>> budget(0.02, "LA_MU", modalities=3, layers=28, neurons=18944)
        10608
    """
    cells = {
        "LA_MU": (modalities, f" for each of {modalities} modalities"),
        "LU_MA": (layers, f" for each of {layers} layers"),
        "uniform": (modalities * layers, f" for each of {modalities} modalities x {layers} layers"),
        "contrastive": (modalities, f" for each of {modalities} modalities"),
    }
    find(strategy)
    if not 0 < ratio <= 1:
        raise ValueError(
            f"ratio must lie in (0, 1], as the share of the model's neurons; got {ratio}."
        )
    if total is None:
        total = layers * neurons
    k = int(ratio * total)
    least, each = cells.get(strategy, (1, ""))
    if k < least:
        full = total == layers * neurons
        many = f"{layers} layers x {neurons}" if full else f"{total}"
        smallest = math.ceil(least / total * 1e6) / 1e6
        while int(smallest * total) < least:
            smallest += 1e-6
        raise ValueError(
            f"ratio {ratio} of {many} neurons is {k} neurons; {strategy} "
            f"needs at least {least}, one{each}. The smallest ratio that works is {smallest:g}."
        )
    return k


def select(
    scores: Float[Tensor, "modality layer neuron"],
    ratio: float,
    strategy: str,
    seed: int = 0,
    exists: Bool[Tensor, "layer neuron"] | None = None,
) -> Bool[Tensor, "set layer neuron"]:
    """Membership of each neuron in each modality's set; `random` gives a single set.

    Args:
        scores: What `combine` returns, for the modalities to select among.
        ratio: Share of the model's neurons to select.
        strategy: One of `STRATEGIES`, or one that an installed package names; see `find`.
        seed: Seed of `random`.
        exists: Which neurons there are, where layers have different numbers of them. Others are
            never chosen, and count for nothing; a package's strategy sees -inf there.

    Raises:
        ValueError: As `budget`, or a package's strategy returns something else than masks.

    Example:
        >>> scores = torch.tensor([[[0.9, 0.1, 0.2, 0.3]], [[0.1, 0.8, 0.2, 0.3]]])
        >>> select(scores, 0.5, "LA_MU")[:, 0].nonzero().tolist()
        [[0, 0], [1, 1]]
    """
    modalities, layers, neurons = scores.shape
    there = torch.ones(layers, neurons, dtype=torch.bool) if exists is None else exists
    k = budget(ratio, strategy, modalities, layers, neurons, int(there.sum()))
    if strategy == "random":
        return random(there, k, seed)[None]
    there = there.to(scores.device)
    if strategy in _ACROSS_LAYERS:
        found = find(strategy)(scores[:, there][:, None], k)
        return torch.zeros_like(scores, dtype=torch.bool).masked_scatter(there, found)
    chosen = find(strategy)(scores.masked_fill(~there, -torch.inf), k)
    if chosen.shape != scores.shape or chosen.dtype != torch.bool:
        raise ValueError(
            f"The strategy {strategy!r} returned {chosen.dtype} of shape {list(chosen.shape)}; "
            f"expected booleans [modality layer neuron] = {list(scores.shape)}, as its scores."
        )
    return chosen & there


def _top(scores: Float[Tensor, " *cell"], k: int) -> Bool[Tensor, " *cell"]:
    # Not topk: it leaves open which of equal scores it takes.
    order = scores.flatten().sort(descending=True, stable=True).indices
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[order[:k]] = True
    return chosen.view(scores.shape)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
