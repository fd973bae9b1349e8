"""Means and differences with their 95 % confidence intervals.

The runs of an arm are draws from a normal distribution with unknown mean and variance, so intervals are Student's:

    mean ± t(0.975, n - 1) · s / √n        s² = Σ (x - mean)² / (n - 1)
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """The mean of n values and half the width of its interval, which needs at least two values."""

    mean: float
    half_width: float | None
    n: int


class Difference(NamedTuple):
    """The difference of two arms, half the width of its interval, and the kind of interval."""

    mean: float
    half_width: float | None
    how: str


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values, one a run; it is NaN if there are none."""
    if not values:
        return Estimate(math.nan, None, 0)
    mean, half_width = mean_and_half_width(np.asarray(values, dtype=float)[:, None])
    return Estimate(float(mean[0]), None if len(values) == 1 else float(half_width[0]), len(values))


def mean_and_half_width(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means over n runs, (n, S) to (S,), and half the widths of their intervals, NaN for one run."""
    n = len(values)
    with np.errstate(invalid="ignore"):  # infinite losses have no spread
        mean = values.mean(axis=0)
        if n == 1:
            return mean, np.full_like(mean, math.nan)
        quantile = stdtrit(n - 1, (1 + CONFIDENCE) / 2)  # scipy.stats does the same, but takes long to import
        return mean, quantile * values.std(axis=0, ddof=1) / math.sqrt(n)


def difference(values: Sequence[tuple[str, float]], baseline: Sequence[tuple[str, float]]) -> Difference:
    """Return the difference of an arm from a baseline.

    Runs with the same seed share what the seed decides (the first weights, the order of the data), so the interval of
    their differences is often narrower. With fewer than two such pairs, the interval is Welch's.
    """
    ours, theirs = dict(values), dict(baseline)
    shared = [seed for seed in ours if seed in theirs]
    if len(ours) == len(values) and len(theirs) == len(baseline) and len(shared) >= 2:
        mean, half_width, n = estimate([ours[seed] - theirs[seed] for seed in shared])
        return Difference(mean, half_width, f"paired by {n} seeds")
    return welch([value for _, value in values], [value for _, value in baseline])


def welch(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Return the difference of two independent means, with the interval of Welch (1947) for unequal variances."""
    mean = float(np.mean(values)) - float(np.mean(baseline))
    if min(len(values), len(baseline)) < 2:
        return Difference(mean, None, "no interval: a single run in an arm")
    how = f"not paired, the seeds are not the same: Welch, {len(values)} and {len(baseline)} runs"
    if len(set(values)) == len(set(baseline)) == 1:
        return Difference(mean, 0.0, how)
    from scipy import stats  # takes long to import, and few comparisons need it

    with warnings.catch_warnings(action="ignore"):  # infinite losses have no spread
        interval = stats.ttest_ind(values, baseline, equal_var=False).confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.high - interval.low) / 2, how)
