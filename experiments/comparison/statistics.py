"""Means and differences with their 95 % confidence intervals, of one comparison or of a family of them.

The runs of an arm are draws from a normal distribution with unknown mean and variance, so intervals are Student's:

    mean ± t(0.975, n - 1) · s / √n        s² = Σ (x - mean)² / (n - 1)

Two arms are compared by the test of Welch (1947), which assumes neither equal variances nor equal numbers of runs. Runs
with the same seed share what the seed decides (the first weights, the order of the data), so the differences within
seeds often vary less than the runs do. Which of the two tests is the narrower is seen only after the runs, so the
paired test has a quarter of the level: p = min(Welch's p, 4 · paired p). Welch's test is conservative for few runs,
which makes room for it, and `tests/claims/test_statistics.py` checks that both together are wrong in about 5 %.

If several arms are compared, some difference is likely to look clear by chance. Holm (1979) bounds the probability of
even one wrong "better" or "worse" in the family by 5 %: the smallest of m values of p is compared with 0.05 / m, the
next with 0.05 / (m - 1), and so on up to the first that is larger. Dunnett's test has more power where variances are
equal. Here they are not: runs that diverge, and runs that all reach an accuracy of 1, are among the arms.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
_LEVEL_OF_PAIRS = 4  # the paired test has a quarter of the level
_RESOLUTION = 4 * float(np.finfo(np.float32).eps)  # metrics are float32: relative differences below it are rounding

BySeed = Sequence[tuple[str, float]]  # seed and value of each run


class Estimate(NamedTuple):
    """The mean of n values and half the width of its interval, which needs two different values."""

    mean: float
    half_width: float | None
    n: int


class Difference(NamedTuple):
    """The difference of two arms, half the width of its interval, its p-value within the family, and how it was found.

    Zero is outside of the interval if and only if `p` is at most 0.05.
    """

    mean: float
    half_width: float | None
    how: str
    p: float = math.nan


class _Test(NamedTuple):
    """A t test of a difference, and the factor by which its p-value is multiplied."""

    mean: float
    error: float  # standard error of the mean
    freedom: float
    factor: int
    how: str

    @property
    def p(self) -> float:
        return min(1.0, 2 * self.factor * float(stdtr(self.freedom, -abs(self.mean) / self.error)))

    def half_width(self, level: float) -> float:
        return float(stdtrit(self.freedom, 1 - level / self.factor / 2)) * self.error


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values, one a run; it is NaN if there are none."""
    if not values:
        return Estimate(math.nan, None, 0)
    mean, half_width = mean_and_half_width(np.asarray(values, dtype=float)[:, None])
    return Estimate(float(mean[0]), None if math.isnan(half_width[0]) else float(half_width[0]), len(values))


def mean_and_half_width(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the means over n runs, (n, S) to (S,), and half the widths of their intervals.

    The width is NaN where runs do not differ, which says nothing about further runs: one run, equal values.
    """
    n = len(values)
    with np.errstate(invalid="ignore"):  # infinite losses have no spread
        mean = values.mean(axis=0)
        spread = np.ptp(values, axis=0)
        quantile = stdtrit(n - 1, (1 + CONFIDENCE) / 2) if n > 1 else math.nan
        half_width = quantile * values.std(axis=0, ddof=min(1, n - 1)) / math.sqrt(n)
        return mean, np.where(spread > _RESOLUTION * np.abs(values).max(axis=0), half_width, math.nan)


def difference(values: BySeed, baseline: BySeed) -> Difference:
    """Return the difference of an arm from a baseline, as the only comparison."""
    return differences([(values, baseline)])[0]


def differences(pairs: Sequence[tuple[BySeed, BySeed]]) -> list[Difference]:
    """Return the difference of the first from the second arm of each pair; the pairs are one family.

    The interval of a difference is at the level with which Holm's procedure compares its p-value. From the first one
    that is not clear on, all have that level. A comparison that no test is possible for does not count in the family.
    """
    comparisons = [_tests(values, baseline) for values, baseline in pairs]
    tested = {i: min(tests, key=lambda test: test.p) for i, tests in enumerate(comparisons) if isinstance(tests, list)}
    found = [each if isinstance(each, Difference) else Difference(math.nan, None, "") for each in comparisons]
    remaining, p, level, clear = len(tested), 0.0, 0.0, True
    for i, test in sorted(tested.items(), key=lambda item: item[1].p):
        if clear:
            level = (1 - CONFIDENCE) / remaining
            clear = test.p <= level
        p = max(p, min(1.0, test.p * remaining))
        remaining -= 1
        found[i] = Difference(test.mean, test.half_width(level), test.how, p)
    return found


def _tests(values: BySeed, baseline: BySeed) -> Difference | list[_Test]:
    """Return the tests that are possible, or the difference alone if none is."""
    ours, theirs = (np.array([value for _, value in arm], dtype=float) for arm in (values, baseline))
    with np.errstate(invalid="ignore"):  # infinite losses have no difference
        mean = float(ours.mean() - theirs.mean())
        scale = _RESOLUTION * float(np.abs(np.concatenate([ours, theirs])).max())
    if not math.isfinite(mean):
        return Difference(mean, None, "none: a value is not finite")
    mean = mean if abs(mean) > scale else 0.0
    if min(len(ours), len(theirs)) < 2:
        return Difference(mean, None, "none: a single run in an arm")
    if max(np.ptp(ours), np.ptp(theirs)) <= scale:
        return Difference(mean, None, "none: the runs of an arm are equal")
    tests = [_welch(ours, theirs)]
    by_seed, others = dict(values), dict(baseline)
    paired = np.array([by_seed[seed] - others[seed] for seed in by_seed if seed in others])
    repeated = len(by_seed) < len(ours) or len(others) < len(theirs)
    if not repeated and 2 * len(paired) > max(2, len(ours), len(theirs)) and np.ptp(paired) > scale:
        n = len(paired)
        error = float(paired.std(ddof=1)) / math.sqrt(n)
        tests.append(_Test(float(paired.mean()), error, n - 1, _LEVEL_OF_PAIRS, f"paired by {n} seeds"))
    return tests


def _welch(ours: np.ndarray, theirs: np.ndarray) -> _Test:
    """Return the test of two means of independent values with unequal variances."""
    squares = [float(values.var(ddof=1)) / len(values) for values in (ours, theirs)]  # of the standard errors
    freedom = sum(squares) ** 2 / (squares[0] ** 2 / (len(ours) - 1) + squares[1] ** 2 / (len(theirs) - 1))
    how = f"Welch, {len(ours)} and {len(theirs)} runs"
    return _Test(float(ours.mean() - theirs.mean()), math.sqrt(sum(squares)), freedom, 1, how)
