"""Curves over layers: means with intervals, and where they change their course.

Pure functions on arrays. Samples are what varies, so intervals are over samples.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Array = np.ndarray[Any, Any]

CONFIDENCE = 0.95


class Curve(NamedTuple):
    """A mean over samples at each layer, with a 95 % percentile bootstrap interval.

    Attributes:
        mean: [layer].
        low: [layer].
        high: [layer].
        resampled: [layer resample], the mean in each resample of the samples; all layers of a
            resample have the same samples.
    """

    mean: Float[Array, " layer"]
    low: Float[Array, " layer"]
    high: Float[Array, " layer"]
    resampled: Float[Array, "layer resample"]


class Changes(NamedTuple):
    """Where a curve changes its slope.

    Attributes:
        layers: The layers, rising; none where a straight line does as well.
        low: Of each, the lower end of a 95 % percentile bootstrap interval.
        high: The upper end.
    """

    layers: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]


def curve(values: Float[Array, "sample layer"], resamples: int = 1000, seed: int = 0) -> Curve:
    """The mean over samples at each layer, with its interval.

    Raises:
        ValueError: There are fewer than two samples.
        ImportError: scipy is missing.

    Example:
        >>> curve(np.array([[0.0, 1.0], [2.0, 3.0]])).mean
        array([1., 2.])
    """
    if len(values) < 2:
        raise ValueError(
            f"An interval over samples needs at least two, and there is {len(values)}."
        )
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("Intervals need scipy: pip install miner-lens[demo]") from error
    found = stats.bootstrap(
        (values.T,),
        np.mean,
        axis=-1,
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        batch=100,
        rng=seed,
    )
    low, high = found.confidence_interval
    return Curve(values.mean(0), low, high, found.bootstrap_distribution)


def change_points(found: Curve, most: int = 2) -> Changes:
    """Layers at which a curve changes its slope.

    The rule: fit continuous lines with 0 to `most` knots at inner layers by least squares, each
    number of knots where they fit best, and take the number with the least Bayesian information
    criterion (two parameters of the line, two for each knot). That number is then fitted to each
    resample of the samples, which gives each knot's interval.

    Args:
        found: The curve.
        most: Two knots tell three stages apart.

    Raises:
        ValueError: `most` is negative.

    Example:
        >>> bend = np.maximum(0.0, np.arange(12) - 5.0) + np.tile([0.01, -0.01], 6)
        >>> change_points(curve(np.stack([bend, bend]))).layers
        (5,)
    """
    if most < 0:
        raise ValueError(f"most must be 0 or more, not {most}.")
    layers = len(found.mean)
    best: tuple[float, Any, Any] | None = None
    for count in range(most + 1):
        # As many points as parameters are fitted exactly, which says nothing.
        if layers <= 2 + 2 * count:
            break
        knots, bases = _bases(layers, count)
        errors = _errors(found.mean[:, None], bases)[:, 0]
        # What rounding leaves of an exact fit is not better than what rounding leaves of another.
        least = max(float(errors.min()), 1e-12 * float((found.mean**2).sum()), 1e-300)
        criterion = layers * np.log(least / layers) + (2 + 2 * count) * np.log(layers)
        if best is None or criterion < best[0]:
            best = float(criterion), knots, bases
    if best is None or not len(best[1][0]):
        return Changes((), (), ())
    _, knots, bases = best
    chosen = knots[_errors(found.mean[:, None], bases)[:, 0].argmin()]
    drawn = knots[_errors(found.resampled, bases).argmin(0)]
    tail = 50 * (1 - CONFIDENCE)
    # An observed layer, not one between two.
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0, method="nearest")
    return Changes(*(tuple(map(int, one)) for one in (chosen, low, high)))


def _bases(
    layers: int, count: int
) -> tuple[Int[Array, "choice knot"], Float[Array, "choice layer basis"]]:
    """Each choice of knots, and an orthonormal basis of the lines with these knots."""
    at = np.arange(layers, dtype=float)
    choices = np.array(list(combinations(range(1, layers - 1), count)), dtype=int)
    choices = choices.reshape(len(choices), count)
    bends = np.maximum(0.0, at[None, :, None] - choices[:, None, :])
    straight = np.broadcast_to(np.stack([np.ones(layers), at], -1), (len(choices), layers, 2))
    return choices, np.linalg.qr(np.concatenate([straight, bends], -1))[0]


def _errors(
    curves: Float[Array, "layer curve"], bases: Float[Array, "choice layer basis"]
) -> Float[Array, "choice curve"]:
    """The sum of squares that each choice of knots leaves of each curve."""
    centred = curves - curves.mean(0)
    errors = np.empty((len(bases), curves.shape[1]))
    for place, basis in enumerate(bases):
        errors[place] = ((centred - basis @ (basis.T @ centred)) ** 2).sum(0)
    return errors
