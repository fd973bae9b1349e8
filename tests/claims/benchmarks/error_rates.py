"""How often `llm-train compare` is wrong about identical arms, and how often it finds an effect of two deviations.

Run `python tests/claims/benchmarks/error_rates.py`: a few minutes on one core; it prints three Markdown tables. It
simulates 1,000 studies of each size, with normally distributed results. A study is wrong if at least one of its
identical arms is "better" or "worse", which should happen in about 5 %. An effect is the difference of each arm from
the first, in standard deviations between seeds. `ttest_ind` is SciPy's test with Holm's correction, which assumes that
all arms vary alike; in the last table, one of two arms with equal means varies ten times as much as the other.
"""

import argparse
import math

import numpy as np
from scipy import stats

from experiments.comparison.statistics import differences


def study(rng: np.random.Generator, n_arms: int, n_seeds: int, shared: float, effect: float) -> np.ndarray:
    """Return the results, (arms, seeds): the seed decides a share of the variance, which is 1."""
    values = math.sqrt(1 - shared) * rng.standard_normal((n_arms, n_seeds))
    values += math.sqrt(shared) * rng.standard_normal(n_seeds)
    values[1:] += effect
    return values


def ours(values: np.ndarray) -> np.ndarray:
    """Return which arms differ from the first by the statistics of the project."""
    baseline, *others = ([(str(seed), value) for seed, value in enumerate(arm)] for arm in values)
    found = differences([(arm, baseline) for arm in others])
    return np.array([abs(each.mean) > each.half_width for each in found])


def scipys(values: np.ndarray) -> np.ndarray:
    """Return which arms differ from the first by `ttest_ind` with Holm's correction."""
    p = stats.ttest_ind(values[1:], values[:1], axis=1).pvalue
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return (adjusted <= 0.05)[np.argsort(order)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=1000)
    n_studies = parser.parse_args().studies
    rng = np.random.default_rng(0)
    print("| identical arms | seeds | share of the seed | studies with a wrong verdict, % |\n|---|---|---|---|")
    for n_seeds, shared in ((5, 0.0), (3, 0.0), (10, 0.0), (5, 0.5)):
        for n_arms in range(2, 13):
            wrong = sum(ours(study(rng, n_arms, n_seeds, shared, 0.0)).any() for _ in range(n_studies))
            print(f"| {n_arms} | {n_seeds} | {shared:.0%} | {100 * wrong / n_studies:.1f} |")
    print("\n| arms | share of the seed | effects found with 5 seeds, % | by ttest_ind, % |\n|---|---|---|---|")
    for n_arms in (2, 3, 5, 12):
        for shared in (0.0, 0.3, 0.5, 0.8):
            studies = [study(rng, n_arms, 5, shared, 2.0) for _ in range(n_studies)]
            found = [100 * np.mean([test(values) for values in studies]) for test in (ours, scipys)]
            print(f"| {n_arms} | {shared:.0%} | {found[0]:.1f} | {found[1]:.1f} |")
    print("\n| seeds of two unlike arms | wrong, % | by ttest_ind, % |\n|---|---|---|")
    for n_seeds in (3, 5, 10):
        studies = [study(rng, 2, n_seeds, 0.0, 0.0) * [[1.0], [10.0]] for _ in range(n_studies)]
        wrong_by = [100 * np.mean([test(values) for values in studies]) for test in (ours, scipys)]
        print(f"| {n_seeds} | {wrong_by[0]:.1f} | {wrong_by[1]:.1f} |")


if __name__ == "__main__":
    main()
