"""Means and differences with their 95 % confidence intervals.

The runs of an arm are draws from a normal distribution with unknown mean and variance, so intervals are Student's:

    mean ± t(0.975, n - 1) · s / √n        s² = Σ (x - mean)² / (n - 1)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and half of the width of its interval, which needs two values at least."""

    mean: float
    half_width: float | None
    n: int


class Difference(NamedTuple):
    """A difference of two arms and half of the width of its interval; `how` says what the interval is of."""

    mean: float
    half_width: float | None
    how: str


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values, one a run.

    Args:
        values: At least one value.
    """
    mean, half_width = mean_and_half_width(np.asarray(values, dtype=float)[:, None])
    return Estimate(float(mean[0]), None if len(values) == 1 else float(half_width[0]), len(values))


def mean_and_half_width(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over runs, and half of the widths of their intervals (NaN for one run).

    Args:
        values: A row a run, (n, S).
    """
    n = len(values)
    with np.errstate(invalid="ignore"):  # infinite losses have no spread
        mean = values.mean(axis=0)
        if n == 1:
            return mean, np.full_like(mean, math.nan)
        return mean, _quantile(n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)


def difference(values: Sequence[tuple[str, float]], baseline: Sequence[tuple[str, float]]) -> Difference:
    """How far an arm lies above another.

    Runs with the same seed share what the seed decides (the first weights, the order of the data), so the interval of
    their differences is often the narrower one. Where there are no two such pairs, it is Welch's.

    Args:
        values: Seed and value of each run of an arm.
        baseline: Those of the other.
    """
    ours, theirs = dict(values), dict(baseline)
    shared = [seed for seed in ours if seed in theirs]
    if len(ours) == len(values) and len(theirs) == len(baseline) and len(shared) >= 2:
        mean, half_width, n = estimate([ours[seed] - theirs[seed] for seed in shared])
        return Difference(mean, half_width, f"paired by {n} seeds")
    return welch([value for _, value in values], [value for _, value in baseline])


def welch(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The difference of two independent means, with the interval of Welch (1947): their variances may differ.

    Args:
        values: An arm's values.
        baseline: Those of the other.
    """
    arms = [np.asarray(arm, dtype=float) for arm in (values, baseline)]
    mean = float(arms[0].mean() - arms[1].mean())
    if min(len(values), len(baseline)) < 2:
        return Difference(mean, None, "no interval: a single run in an arm")
    squares = [arm.var(ddof=1) / len(arm) for arm in arms]  # of the means' standard errors
    how = f"not paired, the seeds are not the same: Welch, {len(values)} and {len(baseline)} runs"
    if sum(squares) == 0:
        return Difference(mean, 0.0, how)
    freedom = sum(squares) ** 2 / sum(square**2 / (len(arm) - 1) for square, arm in zip(squares, arms, strict=True))
    return Difference(mean, float(_quantile(freedom) * math.sqrt(sum(squares))), how)


def _quantile(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
