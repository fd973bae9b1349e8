"""Means, differences and families of differences, against SciPy and in simulated studies."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from experiments.comparison.arms import arms_of
from experiments.comparison.measures import Measure
from experiments.comparison.runs import RunResult, Series
from experiments.comparison.statistics import Difference, difference, differences, estimate
from experiments.comparison.tables import caption, differences_of, verdict

T_2 = 4.302652729911275  # Student's t, 0.975, two degrees of freedom
LOSS = Measure("val/loss", "last", "min")


def by_seed(values: Sequence[float], first: int = 0) -> list[tuple[str, float]]:
    return [(str(first + i), float(value)) for i, value in enumerate(values)]


def ends(found: Difference) -> tuple[float, float]:
    assert found.half_width is not None
    return found.mean - found.half_width, found.mean + found.half_width


def is_clear(found: Difference) -> bool:
    return verdict(found, LOSS) in ("better", "worse")


def test_the_interval_of_a_mean_is_students():
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(T_2 / math.sqrt(3))  # s = 1
    values = [2.31, 2.29, 2.4, 2.33, 2.37]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    found = estimate(values)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert estimate([math.inf, 1.0]).mean == math.inf


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0, 1.0], [2.5, np.nextafter(np.float32(2.5), np.float32(3))]])
def test_runs_that_do_not_differ_have_no_interval(values):
    assert estimate(values).half_width is None


def test_runs_of_unlike_arms_have_welchs_interval():
    ours, theirs = [2.0, 3.1, 4.0], [1.0, 1.2]
    expected = stats.ttest_ind(ours, theirs, equal_var=False)
    found = difference(by_seed(ours), by_seed(theirs, first=3))
    assert ends(found) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.how == "Welch, 3 and 2 runs"


def test_runs_of_the_same_seed_are_paired_at_a_quarter_of_the_level():
    theirs = [2.0, 3.0, 4.0, 5.0, 6.0]
    ours = [2.1, 3.2, 4.1, 5.2, 6.15]
    expected = stats.ttest_rel(ours, theirs)
    found = difference(by_seed(ours), by_seed(theirs))
    assert ends(found) == pytest.approx(tuple(expected.confidence_interval(1 - 0.05 / 4)))
    assert found.p == pytest.approx(4 * expected.pvalue)
    assert found.how == "paired by 5 seeds"
    shuffled = difference(by_seed(ours), by_seed(theirs)[::-1])
    assert shuffled == found
    repeated = [("0", value) for value in ours]  # the seeds are not unique
    assert difference(repeated, by_seed(theirs)).how == "Welch, 5 and 5 runs"


def test_few_shared_seeds_do_not_drop_the_other_runs():
    rng = np.random.default_rng(0)
    ours, theirs = 3 + rng.standard_normal(10), rng.standard_normal(10)
    found = difference(by_seed(ours), by_seed(theirs, first=8))  # two seeds of ten are shared
    assert found.how == "Welch, 10 and 10 runs"
    assert found.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert is_clear(found)
    ours -= 2.5
    theirs[:2] = ours[8:] - (1.0, 1.0001)  # by chance these two pairs have nearly the same difference
    assert difference(by_seed(ours), by_seed(theirs, first=8)).how == "Welch, 10 and 10 runs"


@pytest.mark.parametrize(
    ("ours", "theirs", "mean", "how"),
    [
        ([1.0], [2.0, 3.0], -1.5, "none: a single run in an arm"),
        ([1.0, 1.0], [2.0, 2.0], -1.0, "none: the runs of an arm are equal"),
        (
            [1.0, 1.0],
            [1.0, float(np.nextafter(np.float32(1), np.float32(2)))],
            0.0,
            "none: the runs of an arm are equal",
        ),
        ([1.0, math.inf], [2.0, 3.0], math.inf, "none: a value is not finite"),
    ],
)
def test_values_that_allow_no_interval(ours, theirs, mean, how):
    found = difference(by_seed(ours), by_seed(theirs))
    assert (found.mean, found.half_width, found.how) == (mean, None, how)
    assert verdict(found, LOSS) == "–"


def test_an_arm_without_spread_is_compared_by_the_spread_of_the_other():
    found = difference(by_seed([1.0, 1.0, 1.0]), by_seed([0.2, 0.25, 0.15]))
    assert found.half_width == pytest.approx(T_2 * 0.05 / math.sqrt(3))


def test_a_family_is_corrected_as_by_holm():
    rng = np.random.default_rng(3)
    baseline = rng.standard_normal(6)
    arms = [effect + rng.standard_normal(7) for effect in (4.0, 2.6, 0.3, 0.0)]
    found = differences([(by_seed(arm, first=100), by_seed(baseline)) for arm in arms])
    single = np.array([stats.ttest_ind(arm, baseline, equal_var=False).pvalue for arm in arms])
    order = np.argsort(single)
    adjusted = np.maximum.accumulate(single[order] * np.arange(4, 0, -1)).clip(max=1)
    assert [found[i].p for i in order] == pytest.approx(list(adjusted))
    n_clear = int((adjusted <= 0.05).sum())
    assert 0 < n_clear < 4
    for rank, i in enumerate(order):
        level = 0.05 / (4 - min(rank, n_clear))
        expected = stats.ttest_ind(arms[i], baseline, equal_var=False).confidence_interval(1 - level)
        assert ends(found[i]) == pytest.approx(tuple(expected))
        assert is_clear(found[i]) == (found[i].p <= 0.05) == (rank < n_clear)


def test_a_comparison_without_a_test_does_not_count_in_the_family():
    pair = (by_seed([2.0, 3.1, 4.0]), by_seed([1.0, 1.2, 1.1]))
    assert differences([pair, (by_seed([1.0]), by_seed([2.0]))])[0] == difference(*pair)


# --- simulated studies: `tests/claims/benchmarks/error_rates.py` has 1,000 of each size ---


def simulate(rng: np.random.Generator, n_arms: int, effect: float, shared: float, n_seeds: int = 5) -> list[Difference]:
    """Return the differences from the first arm; the seed decides a share of the variance, which is 1."""
    values = math.sqrt(1 - shared) * rng.standard_normal((n_arms, n_seeds))
    values += math.sqrt(shared) * rng.standard_normal(n_seeds)
    values[1:] += effect
    baseline, *others = map(by_seed, values)
    return differences([(arm, baseline) for arm in others])


@pytest.mark.parametrize("n_arms", [2, 5, 12])
def test_identical_arms_are_rarely_told_apart(n_arms):
    rng, n_studies = np.random.default_rng(0), 400
    wrong = sum(any(map(is_clear, simulate(rng, n_arms, effect=0.0, shared=0.0))) for _ in range(n_studies))
    assert wrong <= stats.binom.ppf(0.99, n_studies, 0.05)


def test_identical_means_of_unlike_spread_are_told_apart_in_little_more_than_one_study_in_twenty():
    rng, n_studies = np.random.default_rng(0), 800
    pairs = ([by_seed(spread * rng.standard_normal(3)) for spread in (1.0, 10.0)] for _ in range(n_studies))
    wrong = sum(is_clear(difference(*pair)) for pair in pairs)
    assert wrong <= stats.binom.ppf(0.99, n_studies, 0.06)


def test_effects_are_found_as_often_as_by_scipys_test():
    """With paired seeds more often: 0.8 of the variance is shared, which `ttest_ind` cannot use."""
    n_studies = 400
    for shared, least in ((0.0, 0.74), (0.3, 0.78), (0.8, 0.95)):
        rng = np.random.default_rng(1)
        found = sum(is_clear(simulate(rng, 2, effect=2.0, shared=shared)[0]) for _ in range(n_studies))
        assert found / n_studies >= least


# --- the table ---


def arms_with(losses: Sequence[Sequence[Sequence[float]]]) -> list:
    """Return an arm for each list of runs; a run is its validations."""
    runs = [
        RunResult(f"{arm}-{seed}", "finished", "", {"width": arm}, {"seed": seed}, {},
            {"val/loss": Series(np.arange(len(values)), np.array(values))})
        for arm, group in enumerate(losses)
        for seed, values in enumerate(group)
    ]  # fmt: skip
    return arms_of(runs)


def test_best_values_are_compared_only_at_equal_numbers_of_validations():
    arms = arms_with([[[3.0, 2.0, 2.5], [3.0, 2.1, 2.6]], [[2.7, 2.2], [2.9, 2.4]]])
    table = differences_of([(arms[1], arms[0])], [Measure("val/loss", "best", "min"), LOSS])
    best, last = table.rows
    assert best[3:] == ["–", "–", "none: unequal numbers of validations"]
    assert last[-1] == "Welch, 2 and 2 runs"
    assert caption(table) == ["One comparison, at a level of 5 %."]
    equal = differences_of([(arms[0], arms[0])], [Measure("val/loss", "best", "min")])
    assert equal.rows[0][-1] == "Welch, 2 and 2 runs"


def test_the_caption_has_the_number_of_comparisons():
    arms = arms_with([[[1.0], [1.1]], [[2.0], [2.2]], [[3.0], [3.4]]])
    table = differences_of([(arms[1], arms[0]), (arms[2], arms[0])], [LOSS])
    assert caption(table) == ["2 comparisons, corrected together by Holm's procedure."]
