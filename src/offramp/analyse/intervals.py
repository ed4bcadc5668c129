"""Intervals: of a share, of the difference of two paired shares, and of means by resampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from offramp.errors import DataError

__all__ = ["Interval", "bootstrap", "paired_difference", "wilson"]

Interval = tuple[float, float]
DRAWN = 10_000_000  # counts that are kept at once, 80 MB


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """The score interval of a share (Wilson, 1927).

    The shares p that a test at this level does not reject:
    ``|successes / trials - p| <= z sqrt(p (1 - p) / trials)``. It stays inside [0, 1] and has a
    width also where nothing or everything succeeded.

    Args:
        successes: how many succeeded.
        trials: out of how many, at least 1.
        level: the confidence, strictly between 0 and 1.

    Returns:
        Lower and upper end, as shares.

    Raises:
        DataError: no trials, more successes than trials, or a level outside (0, 1).
    """
    z = _quantile(level)
    if not 0 <= successes <= trials or trials < 1:
        raise DataError(
            f"An interval of a share needs 0 <= successes <= trials and trials >= 1, "
            f"got {successes} of {trials}."
        )
    share, squared = successes / trials, z * z
    centre = (share + squared / (2 * trials)) / (1 + squared / trials)
    spread = share * (1 - share) / trials + squared / (4 * trials * trials)
    half = z * math.sqrt(spread) / (1 + squared / trials)
    lower = 0.0 if successes == 0 else centre - half
    upper = 1.0 if successes == trials else centre + half
    return lower, upper


def paired_difference(gained: int, lost: int, trials: int, level: float = 0.95) -> Interval:
    """The score interval of the difference of two paired shares (Tango, 1998, equation 7).

    Two methods answer the same samples; the difference of their accuracies is
    ``(gained - lost) / trials``. Unlike a bootstrap it has a width also where no sample tells the
    two apart, so that a small test set cannot look like a proof.

    Args:
        gained: samples that only the first method gets right.
        lost: samples that only the second gets right.
        trials: all samples.
        level: the confidence, strictly between 0 and 1.

    Returns:
        Lower and upper end of first minus second, in [-1, 1].

    Raises:
        DataError: counts that do not fit, or a level outside (0, 1).
    """
    z = _quantile(level)
    if gained < 0 or lost < 0 or trials < 1 or gained + lost > trials:
        raise DataError(
            f"A paired difference needs gained + lost <= trials and trials >= 1, "
            f"got gained={gained}, lost={lost}, trials={trials}."
        )

    def statistic(delta: float) -> float:
        # The share of samples that only the second gets right, most likely under this difference.
        linear = -(gained + lost) + (2 * trials - gained + lost) * delta
        constant = -lost * delta * (1 - delta)
        root = math.sqrt(max(linear * linear - 8 * trials * constant, 0.0))
        share = (root - linear) / (4 * trials)
        variance = trials * (2 * share + delta * (1 - delta))
        distance = gained - lost - trials * delta
        if variance <= 0:  # nothing but this difference is possible
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    observed, edge = (gained - lost) / trials, 1 - 1e-12
    # The statistic falls as delta grows: +z at the lower end, -z at the upper, if it comes so far.
    lower = brentq(lambda d: statistic(d) - z, -edge, observed) if statistic(-edge) > z else -1.0
    upper = brentq(lambda d: statistic(d) + z, observed, edge) if statistic(edge) < -z else 1.0
    return float(lower), float(upper)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a function of means, by resampling samples (Efron, 1979).

    Rows that are equal are drawn together, as counts, so the time it takes grows with the number of
    different rows: an early-exit network has few.

    Args:
        values: (N,) or (N, D), one row a sample; its columns are resampled together.
        statistic: from the means (R, D) of the resamples to (R,); by default the mean itself.
        level: the confidence, strictly between 0 and 1.
        resamples: R, how many times to draw N samples.
        seed: of the draws.

    Returns:
        Lower and upper end; what the samples themselves give lies between them.

    Raises:
        DataError: no samples, no resamples, or a level outside (0, 1).
    """
    _quantile(level)
    if resamples < 1:
        raise DataError(f"A bootstrap needs one resample or more, got resamples={resamples}.")
    rows = np.asarray(values, dtype=np.float64)
    if not rows.size:
        raise DataError("A bootstrap needs at least one sample, got none.")
    rows = rows.reshape(len(rows), -1)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    shares = counts / len(rows)
    generator, most = np.random.default_rng(seed), max(1, DRAWN // len(distinct))
    sizes = [min(most, resamples - done) for done in range(0, resamples, most)]
    drawn = [generator.multinomial(len(rows), shares, size) @ distinct for size in sizes]
    own = shares[None] @ distinct
    # One distinct row is its own mean; summed and divided, it would be another in its last bits.
    means = np.concatenate(drawn) / len(rows) if len(distinct) > 1 else own
    means = np.concatenate([means, own])
    results = means[:, 0] if statistic is None else statistic(means)
    point = float(results[-1])
    tail = (1 - level) / 2
    lower, upper = np.quantile(results[:-1], [tail, 1 - tail])
    return min(float(lower), point), max(float(upper), point)


def _quantile(level: float) -> float:
    """The two-sided quantile of the normal distribution, 1.96 for 0.95."""
    if not 0 < level < 1:
        raise DataError(f"The level of an interval lies strictly between 0 and 1, got {level}.")
    return float(norm.ppf((1 + level) / 2))
