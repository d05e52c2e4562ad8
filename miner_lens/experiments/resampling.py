"""Intervals and tests by drawing samples again, of arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

CONFIDENCE = 0.95
# So many resamples are held at a time.
_BATCH = 200


def interval(
    values: Float[np.ndarray, "row sample"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """A percentile bootstrap interval of each row's mean, all by the same resamples."""
    stats = _scipy()
    found = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        batch=_BATCH,
        rng=seed,
    )
    low, high = found.confidence_interval
    return low, high


def contrast_interval(
    one: Float[np.ndarray, " sample"],
    other: Float[np.ndarray, " sample"],
    resamples: int = 5000,
    seed: int = 0,
) -> tuple[float, float]:
    """A percentile bootstrap interval of the contrast of two means, paired by sample."""
    found = _scipy().bootstrap(
        (one, other),
        contrast,
        axis=-1,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        batch=_BATCH,
        rng=seed,
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def contrast(one: Any, other: Any, axis: int = -1) -> Any:
    """How much larger one mean is than another, from -1 to 1: (one - other) / (one + other).

    A mean below 0 counts as 0; where neither is above 0 the contrast is 0.

    Example:
        >>> float(contrast(np.array([2.0, 4.0]), np.array([1.0, 1.0])))
        0.5
        >>> float(contrast(np.array([2.0]), np.array([-1.0])))
        1.0
    """
    above, below = (np.mean(values, axis=axis).clip(0) for values in (one, other))
    total = above + below
    return np.divide(above - below, total, out=np.zeros_like(total), where=total > 0)


def p_values(
    differences: Float[np.ndarray, "row sample"], resamples: int, seed: int
) -> Float[np.ndarray, " row"]:
    """Of each row's hypothesis that differences are as often negative as positive, or more."""
    stats = _scipy()
    found = stats.permutation_test(
        (differences,),
        np.mean,
        axis=-1,
        permutation_type="samples",  # of one sample: changes of sign
        alternative="greater",
        n_resamples=resamples,
        batch=_BATCH,
        vectorized=True,
        rng=seed,
    )
    p: Float[np.ndarray, " row"] = found.pvalue
    return p


def holm(p: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """P-values adjusted for being of one family."""
    try:
        from statsmodels.stats.multitest import multipletests
    except ImportError as error:
        raise ImportError(
            "Adjusting for many comparisons needs statsmodels: pip install miner-lens[demo]"
        ) from error
    adjusted: Float[np.ndarray, " row"] = multipletests(p, method="holm")[1]
    return adjusted


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("Intervals and tests need scipy: pip install miner-lens[demo]") from error
    return stats
