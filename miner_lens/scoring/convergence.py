"""How near two clouds of hidden states are to one another. Pure functions on arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Array = np.ndarray[Any, Any]

CONFIDENCE = 0.95
GROUPS = 20  # of samples, of which the jackknife leaves out one at a time
FOLDS = 5


class Interval(NamedTuple):
    """A value with a 95 % interval.

    Attributes:
        value: Of all samples.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def cka(x: Float[Array, "sample one"], y: Float[Array, "sample other"]) -> float:
    """Linear centred kernel alignment of two representations of the same samples, debiased.

    1 where one is the other, turned and scaled; about 0 where they have nothing to do with one
    another, however many dimensions there are (Kornblith et al. 2019, arXiv 1905.00414, with the
    unbiased estimator of Song et al. 2012). It may be a little below 0.

    Raises:
        ValueError: The samples are not the same in number, or fewer than four.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(10, 3))
        >>> round(cka(x, 2 * x[:, ::-1]), 6)
        1.0
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"CKA is of at least four samples in two ways; got {len(x)} and {len(y)}.")
    one, other = _unbiased(x), _unbiased(y)
    scale = np.sqrt((one * one).sum() * (other * other).sum())
    # A representation that is the same for all samples is like no other.
    return float((one * other).sum() / scale) if scale > 1e-300 else 0.0


def _unbiased(x: Float[Array, "sample d_model"]) -> Float[Array, "sample sample"]:
    """The kernel of U-centring, whose products are unbiased (Székely and Rizzo 2014)."""
    x = x - x.mean(0)
    kernel, n = x @ x.T, len(x)
    np.fill_diagonal(kernel, 0.0)
    rows = kernel.sum(0)
    both = rows[:, None] + rows[None]
    centred: Array = kernel - both / (n - 2) + kernel.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0.0)
    return centred


def centroid_distance(x: Float[Array, "row d_model"], y: Float[Array, "other d_model"]) -> float:
    """The distance of two centroids against the spread of the clouds around them.

    Spread is the root mean square distance of a cloud's rows to its centroid; of both clouds, the
    root of their mean square. 0 where clouds have the same centre; clouds are apart above 1.

    Example:
        >>> x = np.array([[-1.0], [1.0]])
        >>> centroid_distance(x, x + 3)
        3.0
    """
    apart = np.linalg.norm(x.mean(0) - y.mean(0))
    spread = np.sqrt(
        ((x - x.mean(0)) ** 2).sum(1).mean() / 2 + ((y - y.mean(0)) ** 2).sum(1).mean() / 2
    )
    return float(apart / spread) if spread > 1e-300 else 0.0


def effective_dimension(x: Float[Array, "row d_model"]) -> float:
    """How many directions a cloud spreads in: the participation ratio of its covariance.

    (sum of eigenvalues)² / sum of their squares: d where it spreads alike in d directions. Of few
    rows it is smaller than of many, so compare clouds of equal size.

    Example:
        >>> effective_dimension(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        2.0
    """
    x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    squares = (gram**2).sum()
    return float(np.trace(gram) ** 2 / squares) if squares > 1e-300 else 0.0


def held_out(
    x: Float[Array, "row d_model"], labels: Int[Array, " row"], samples: Int[Array, " row"]
) -> Float[Array, " row"]:
    """Whether a linear classifier tells each row's label that it was not fitted to.

    A ridge classifier on standardised coordinates, cross-validated; all rows of a sample are held
    out together.

    Raises:
        ValueError: There are fewer than two samples.
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import RidgeClassifier
        from sklearn.model_selection import GroupKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "Separability needs scikit-learn: pip install miner-lens[demo]"
        ) from error
    folds = min(FOLDS, len(np.unique(samples)))
    if folds < 2:
        raise ValueError("Separability is of rows of at least two samples.")
    model = make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced"))
    told = cross_val_predict(model, x, labels, groups=samples, cv=GroupKFold(folds))
    right: Float[Array, " row"] = (told == labels).astype(float)
    return right


def jackknife(
    measure: Callable[[Int[Array, " sample"]], float], samples: int, groups: int = GROUPS
) -> Interval:
    """A measure of samples with an interval, by leaving out one group of samples at a time.

    Not by the bootstrap: samples that are drawn twice are alike, which CKA and dimensions take for
    structure. The interval is of Student's t.

    Args:
        measure: Takes places of samples.
        samples: How many there are.
        groups: How many to make of them at most.

    Raises:
        ValueError: There are fewer than two samples.
        ImportError: scipy is missing.

    Example:
        >>> x = np.arange(10.0)
        >>> found = jackknife(lambda places: float(x[places].mean()), 10)
        >>> found.value, round(found.high - found.value, 2)
        (4.5, 2.17)
    """
    if samples < 2:
        raise ValueError(f"An interval over samples needs at least two, and there is {samples}.")
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("Intervals need scipy: pip install miner-lens[demo]") from error
    every, count = np.arange(samples), min(groups, samples)
    left_out = [measure(every[every % count != group]) for group in range(count)]
    deviation = float(np.sqrt((count - 1) * np.var(left_out)))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation
    value = measure(every)
    return Interval(value, value - half, value + half)
