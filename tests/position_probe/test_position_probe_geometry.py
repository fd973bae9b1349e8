"""The measures of a position matrix, compared with values computed by hand."""

import numpy as np
import pytest

from lightning_modules.position_probe import geometry

T = 40
ANGLES = np.pi * np.arange(T) / T
HALF_CIRCLE = np.stack(
    [np.cos(ANGLES), np.sin(ANGLES)], axis=1
)  # similarity falls with distance, and depends on it alone
GAUSSIAN = np.random.default_rng(0).standard_normal((T, 30))


def test_cosines_lie_between_minus_one_and_one_and_a_row_of_zeros_has_none():
    cosines = geometry.cosine_similarity(np.array([[3.0, 0.0], [0.0, 0.0], [1.0, 1.0], [-2.0, 0.0]]))
    assert cosines[0] == pytest.approx([1, 0, 2**-0.5, -1])
    assert (cosines[1] == 0).all()


def test_means_and_spreads_by_distance():
    proximity = np.array([[9.0, 1.0, 5.0], [1.0, 9.0, 3.0], [5.0, 3.0, 9.0]])
    mean, spread = geometry.by_distance(proximity)
    assert mean.tolist() == [2.0, 5.0]
    assert spread.tolist() == [1.0, 0.0]
    assert geometry.band_width(proximity) == pytest.approx((2 * 1.0 + 1 * 0.0) / 3)


def test_every_property_holds_where_similarity_depends_on_distance_alone():
    cosines = geometry.cosine_similarity(HALF_CIRCLE)
    assert geometry.distance_correlation(cosines) == pytest.approx(-1, abs=1e-3)  # equal ones differ by rounding
    assert geometry.band_width(cosines) == pytest.approx(0, abs=1e-12)
    for measure in (
        geometry.toeplitz_fit,
        geometry.translation_invariance,
        geometry.monotonicity,
        geometry.symmetry,
    ):
        assert measure(cosines) == pytest.approx(1), measure.__name__


def test_rows_without_order_have_no_property():
    inner = GAUSSIAN @ GAUSSIAN.T
    assert abs(geometry.distance_correlation(inner)) < 0.1
    assert geometry.toeplitz_fit(inner) < 4 / T  # 2 / T is expected
    assert abs(geometry.translation_invariance(inner)) < 0.1
    assert abs(geometry.symmetry(inner)) < 0.15
    assert geometry.monotonicity(inner) == pytest.approx(0.5, abs=0.05)


def test_the_correlation_is_of_ranks_with_ties():
    proximity = np.array([[9.0, 1, 1, 0], [1, 9, 5, 0], [1, 5, 9, 2], [0, 0, 2, 9]])
    # The ranks of the proximities 1 1 0 5 0 2, and of the distances 1 2 3 1 2 1:
    expected = np.corrcoef([3.5, 3.5, 1.5, 6, 1.5, 5], [2, 4.5, 6, 2, 4.5, 2])[0, 1]
    assert geometry.distance_correlation(proximity) == pytest.approx(expected)


def test_a_toeplitz_fit_by_hand():
    proximity = np.array([[0.0, 1.0, 5.0], [1.0, 0.0, 3.0], [5.0, 3.0, 0.0]])
    # pairs 1, 3, 5; their diagonals' means 2, 2, 5: residuals -1, 1, 0 of a variance of 8/3
    assert geometry.toeplitz_fit(proximity) == pytest.approx(1 - (2 / 3) / (8 / 3))


def test_monotonicity_by_hand():
    proximity = np.array([[0.0, 3.0, 2.0, 4.0], [3.0, 0.0, 3.0, 1.0], [2.0, 3.0, 0.0, 9.0], [4.0, 1.0, 9.0, 0.0]])
    # ahead of 0: 3 2 4 has one of three right; ahead of 1: 3 1; behind 2: 3 2; behind 3: 9 1 4 has two of three
    assert geometry.monotonicity(proximity) == pytest.approx((1 + 1 + 1 + 2) / 8)
    assert geometry.monotonicity(proximity, reach=2) == pytest.approx(4 / 4)


def test_symmetry_by_hand():
    proximity = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 3.0], [4.0, 3.0, 0.0]])
    # around position 1: 3 ahead, 1 behind; the pairs 1, 4, 3 have a variance of 14/9
    assert geometry.symmetry(proximity) == pytest.approx(1 - 4 / (2 * 14 / 9))


def test_growing_norms_break_translation_invariance_of_inner_products():
    growing = HALF_CIRCLE * np.linspace(1, 3, T)[:, None]
    assert geometry.translation_invariance(growing @ growing.T) < 0.9
    assert geometry.translation_invariance(geometry.cosine_similarity(growing)) == pytest.approx(1)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_effective_rank_counts_equal_directions(rank):
    rows = np.zeros((2 * rank, 10))
    rows[np.arange(rank), np.arange(rank)] = 1
    rows[rank + np.arange(rank), np.arange(rank)] = -1  # rank directions of the same variance
    assert geometry.effective_rank(rows) == pytest.approx(rank)


def test_principal_components_rebuild_the_rows():
    scores, variance, directions = geometry.principal_components(GAUSSIAN)
    assert scores @ directions + GAUSSIAN.mean(axis=0) == pytest.approx(GAUSSIAN)
    assert variance == pytest.approx(scores.var(axis=0) / scores.var(axis=0).sum())
    assert (np.diff(variance) <= 0).all()


@pytest.mark.parametrize("n", [40, 41])
def test_a_wave_has_its_frequency(n):
    along = 2 * np.pi * np.arange(n) / n
    columns = np.stack([5 + np.cos(3 * along), np.sin(7 * along) + 0.1 * np.cos(2 * along)], axis=1)
    frequencies, shares = geometry.dominant_frequencies(columns)
    assert frequencies.tolist() == [3, 7]
    assert shares == pytest.approx([1, 1 / 1.01])
    random = np.random.default_rng(1).standard_normal((n, 4))
    assert geometry.power_spectrum(random).sum(axis=0) == pytest.approx(np.ones(4))
    assert len(geometry.power_spectrum(random)) == n // 2


def test_the_angle_between_the_main_directions_of_two_sets_of_rows():
    rng = np.random.default_rng(0)
    rows, others = np.zeros((30, 8)), np.zeros((500, 8))
    rows[:, :2], others[:, 2:5] = rng.standard_normal((30, 2)), rng.standard_normal((500, 3))
    assert geometry.subspace_angle(rows, others, 2) == pytest.approx(90)
    assert geometry.subspace_angle(rows, rows @ np.diag([3, -2, 1, 1, 1, 1, 1, 1]), 2) == pytest.approx(0, abs=1e-4)
    tilted = rng.standard_normal((500, 1)) * np.array([1.0, 0, 1, 0, 0, 0, 0, 0])  # 45 degrees from the first axis
    assert geometry.subspace_angle(rows[:, :1] * np.eye(1, 8), tilted, 1) == pytest.approx(45)


def test_all_measures_of_sinusoids():
    from datamodules.position_probe.position_matrices import sinusoids

    found = geometry.measures(sinusoids(64, 32))
    assert "token_angle" not in found
    assert found["toeplitz_fit"] == found["translation_invariance"] == found["symmetry"] == pytest.approx(1)
    assert found["distance_correlation"] < -0.8
    assert found["mean_norm"] == pytest.approx(4)  # each of the 16 pairs of sine and cosine has norm 1
    assert found["first_norm_over_median"] == pytest.approx(1)
    shares = [found[f"variance_in_{k}"] for k in (2, 3, 10, 30)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, abs=1e-6)
    assert "token_angle" in geometry.measures(GAUSSIAN, tokens=np.random.default_rng(2).standard_normal((99, 30)))
