"""Measures of a position matrix that need no training.

A position matrix has one row for each position, (T, d). The functions measure how the similarity of two rows depends
on the distance of their positions, and along which directions and frequencies the rows vary.

Translation invariance, monotonicity and symmetry are the properties of Wang et al., "On Position Embeddings in BERT"
(2021), https://openreview.net/forum?id=onxoVA9FxMw. The paper states them as equations, and measures them on the
attention of a model. This file measures how nearly they hold for a matrix alone.

Arguments: `rows` (T, d); `proximity` (T, T), the similarity of every two positions; `columns` (T, n), functions of
the position. SciPy is imported where it is used, because it is slow to import.
"""

import numpy as np

NEAR = 16  # largest offset of local monotonicity


def cosine_similarity(rows: np.ndarray) -> np.ndarray:
    """Return the cosine of the angle between every two rows, (T, T); 0 for a row of zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(norms > 0, norms, 1)
    return directions @ directions.T


def by_distance(proximity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the proximity at the distances 1, 2, ... T - 1, (T - 1,) each."""
    diagonals = [np.diagonal(proximity, offset) for offset in range(1, len(proximity))]
    return np.array([d.mean() for d in diagonals]), np.array([d.std() for d in diagonals])


def _pairs(proximity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return proximity and distance of every pair of positions, (T (T - 1) / 2,) each."""
    first, second = np.triu_indices(len(proximity), 1)
    return proximity[first, second], second - first


def distance_correlation(proximity: np.ndarray) -> float:
    """Return Spearman's rank correlation of proximity and distance over all pairs; -1 where nearer is more similar."""
    from scipy.stats import spearmanr

    return float(spearmanr(*_pairs(proximity)).statistic)


def band_width(proximity: np.ndarray) -> float:
    """Return the standard deviation of the proximity among pairs of the same distance, averaged over all pairs."""
    _, spread = by_distance(proximity)
    return float(np.average(spread, weights=np.arange(len(proximity) - 1, 0, -1)))


def toeplitz_fit(proximity: np.ndarray) -> float:
    """Return the share of the variance of the proximities that the distance explains; 1 for a Toeplitz matrix.

    The nearest matrix that is constant along each diagonal has the mean of the diagonal there. The main diagonal is
    left out. For rows without order the value is about 2 / T, because T - 1 means are fitted.
    """
    values, distances = _pairs(proximity)
    residual = values - by_distance(proximity)[0][distances - 1]
    return float(1 - residual.var() / values.var())


def translation_invariance(proximity: np.ndarray) -> float:
    """Return how nearly φ(x, x + m) is the same for all x: 1 - (variance along a diagonal) / (variance of all pairs).

    Every offset m with more than one pair has the same weight. The value is about 0 for rows without order.
    """
    along = [np.diagonal(proximity, offset).var(ddof=1) for offset in range(1, len(proximity) - 1)]
    return float(1 - np.mean(along) / _pairs(proximity)[0].var(ddof=1))


def monotonicity(proximity: np.ndarray, reach: int | None = None) -> float:
    """Return how often the nearer of two positions on the same side of a third is the more similar one, a share.

    The value is 1 where φ(x, x + m) falls with every step of m, and about 1/2 for rows without order. `reach` is the
    largest offset, for local monotonicity.
    """
    right, total = 0, 0
    for x in range(len(proximity)):
        for side in (proximity[x, x + 1 :], proximity[x, :x][::-1]):  # by growing distance
            side = side[:reach]
            right += int(np.count_nonzero(np.triu(side[:, None] > side, k=1)))
            total += len(side) * (len(side) - 1) // 2
    return right / total


def symmetry(proximity: np.ndarray) -> float:
    """Return how nearly the proximity to the position m ahead equals that to the position m behind.

    φ(x, y) = φ(y, x) holds for every inner product. Together with translation invariance it gives φ(x, x + m) =
    φ(x, x - m). The value is 1 - (mean square of their difference) / (twice the variance of all pairs): 1 where the
    equation holds. For rows without order it is between about 0 and 1/2, by the size of their common mean; compare it
    with that of the same rows shuffled.
    """
    differences = []
    for x in range(1, len(proximity) - 1):
        reach = min(x, len(proximity) - 1 - x)
        differences.append(proximity[x, x + 1 : x + 1 + reach] - proximity[x, x - reach : x][::-1])
    return float(1 - np.mean(np.concatenate(differences) ** 2) / (2 * _pairs(proximity)[0].var()))


def principal_components(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return coordinates (T, r), shares of the variance (r,) and directions (r, d) of the principal components."""
    u, s, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    return u * s, s**2 / np.sum(s**2), directions


def effective_rank(rows: np.ndarray) -> float:
    """Return the number of directions in which the rows vary, weighted by how much (Roy and Vetterli, 2007).

    It is exp(-Σ p log p), where p are the singular values of the centred rows divided by their sum: k if k of them are
    equal and the rest 0.
    """
    from scipy.stats import entropy

    return float(np.exp(entropy(np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False))))


def power_spectrum(columns: np.ndarray) -> np.ndarray:
    """Return the share of the variance of each column at 1, 2, ... T // 2 cycles over the positions, (T // 2, n)."""
    from scipy.signal import periodogram

    power = periodogram(columns, scaling="spectrum", axis=0)[1][1:]
    total = power.sum(axis=0)
    return power / np.where(total > 0, total, 1)


def dominant_frequencies(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the strongest frequency of each column, in cycles over the positions, and its share of the variance."""
    power = power_spectrum(columns)
    return power.argmax(axis=0) + 1, power.max(axis=0)


def subspace_angle(rows: np.ndarray, others: np.ndarray, n_components: int = 10) -> float:
    """Return the mean principal angle, in degrees, between the directions in which (T, d) and (V, d) rows vary most.

    It is 90 where the two sets share no direction, 0 where they vary in the same ones. The directions are the leading
    `n_components` principal components of each set.
    """
    from scipy.linalg import subspace_angles

    n = min(n_components, len(rows) - 1, rows.shape[1])
    centred = others - others.mean(axis=0)
    theirs = np.linalg.eigh((centred.T @ centred).astype(np.float64))[1][:, -n:]  # (d, n)
    return float(np.degrees(subspace_angles(principal_components(rows)[2][:n].T, theirs)).mean())


def measures(rows: np.ndarray, tokens: np.ndarray | None = None) -> dict[str, float]:
    """Return all measures by name; `token_angle` needs the token embeddings of the same model, (V, d)."""
    cosine, inner = cosine_similarity(rows), rows @ rows.T
    scores, variance, _ = principal_components(rows)
    frequencies, power = dominant_frequencies(scores[:, :1])
    norms = np.linalg.norm(rows, axis=1)
    found = {
        "distance_correlation": distance_correlation(cosine),
        "band_width": band_width(cosine),
        "toeplitz_fit": toeplitz_fit(cosine),
        "translation_invariance": translation_invariance(inner),
        "monotonicity": monotonicity(inner),
        "local_monotonicity": monotonicity(inner, NEAR),
        "symmetry": symmetry(inner),
        **{f"variance_in_{k}": float(variance[:k].sum()) for k in (2, 3, 10, 30)},
        "effective_rank": effective_rank(rows),
        "dominant_frequency": float(frequencies[0]),
        "dominant_share": float(power[0]),
        "mean_norm": float(norms.mean()),
        "first_norm_over_median": float(norms[0] / np.median(norms)),
    }
    if tokens is not None:
        found["token_angle"] = subspace_angle(rows, tokens)
    return found
