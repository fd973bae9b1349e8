"""What can be measured on a position matrix without training anything.

A position matrix holds a row for each position, (T, d). The functions ask how the likeness of two rows depends on how
far apart their positions are, and along which directions and frequencies the rows vary.

    likeness by distance    do near positions have rows that are alike, and does the distance alone decide how alike?
    three properties        translation invariance, monotonicity and symmetry of the inner products x_i · x_j
    spectrum                in how many directions the rows vary, and with which period along the positions

The properties are those of Wang et al., "On Position Embeddings in BERT" (2021),
https://openreview.net/forum?id=onxoVA9FxMw. The paper states them as equations that hold or do not, and measures them
on the attention inside a model; the numbers here, which say how nearly they hold for a matrix alone, are our reading.
"""

import numpy as np

NEAR = 16  # offsets up to which monotonicity is called local


def cosine_similarity(rows: np.ndarray) -> np.ndarray:
    """The cosine of the angle between each two rows: (T, T); 0 for a row of zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    directions = rows / np.where(norms > 0, norms, 1)
    return directions @ directions.T


def by_distance(proximity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the proximity of positions that lie 1, 2, ... T - 1 apart: (T - 1,) each."""
    diagonals = [np.diagonal(proximity, offset) for offset in range(1, len(proximity))]
    return np.array([d.mean() for d in diagonals]), np.array([d.std() for d in diagonals])


def distance_correlation(proximity: np.ndarray) -> float:
    """Spearman's rank correlation of proximity with distance over all pairs; -1 where nearer is always more alike."""
    first, second = np.triu_indices(len(proximity), 1)
    return float(np.corrcoef(_ranks(proximity[first, second]), _ranks(second - first))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def band_width(proximity: np.ndarray) -> float:
    """How much pairs of the same distance differ in proximity: their standard deviation, averaged over all pairs."""
    _, spread = by_distance(proximity)
    return float(np.average(spread, weights=np.arange(len(proximity) - 1, 0, -1)))


def toeplitz_fit(proximity: np.ndarray) -> float:
    """Share of the variance of the proximities that the distance alone explains: 1 for a Toeplitz matrix.

    The matrix nearest to it that is constant along each diagonal has the mean of the diagonal there. The main diagonal
    is left out. Rows without any order reach 2 / T, because there are T - 1 means to fit.
    """
    mean, _ = by_distance(proximity)
    first, second = np.triu_indices(len(proximity), 1)
    residual = proximity[first, second] - mean[second - first - 1]
    return float(1 - residual.var() / proximity[first, second].var())


def translation_invariance(proximity: np.ndarray) -> float:
    """How nearly φ(x, x + m) is the same for all x: 1 less the variance along a diagonal over that of all pairs.

    Every offset m with more than one pair counts alike. 1 where the property holds, about 0 for rows without order.
    """
    along = [np.diagonal(proximity, offset).var(ddof=1) for offset in range(1, len(proximity) - 1)]
    return float(1 - np.mean(along) / proximity[np.triu_indices(len(proximity), 1)].var(ddof=1))


def monotonicity(proximity: np.ndarray, reach: int | None = None) -> float:
    """Share of the cases in which the nearer of two positions on the same side of a third is the more alike.

    1 where φ(x, x + m) falls with every step of m, 1/2 for rows without order.

    Args:
        proximity: (T, T).
        reach: Only positions at most so far away, for local monotonicity; `None` for all.
    """
    right = total = 0
    for x in range(len(proximity)):
        for side in (proximity[x, x + 1 :], proximity[x, :x][::-1]):  # by growing distance
            side = side[:reach]
            right += np.count_nonzero(np.triu(side[:, None] > side, k=1))
            total += len(side) * (len(side) - 1) // 2
    return right / total


def symmetry(proximity: np.ndarray) -> float:
    """How nearly the proximity to the position m ahead is that to the position m behind; 1 where it always is.

    φ(x, y) = φ(y, x) holds of every inner product. With translation invariance it comes to φ(x, x + m) = φ(x, x - m),
    and this is measured: 1 less the mean square of their difference over twice the variance of all pairs. About 0 for
    rows without order.
    """
    differences = []
    for x in range(1, len(proximity) - 1):
        reach = min(x, len(proximity) - 1 - x)
        differences.append(proximity[x, x + 1 : x + 1 + reach] - proximity[x, x - reach : x][::-1])
    variance = proximity[np.triu_indices(len(proximity), 1)].var()
    return float(1 - np.mean(np.concatenate(differences) ** 2) / (2 * variance))


def principal_components(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Principal components of the rows about their mean.

    Returns:
        The rows' coordinates (T, r), the share of the variance of each component (r,), its direction (r, d).
    """
    u, s, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    return u * s, s**2 / np.sum(s**2), directions


def effective_rank(rows: np.ndarray) -> float:
    """Number of directions in which the rows vary, weighed by how much (Roy and Vetterli, 2007).

    exp(-Σ p log p) with p the singular values about the mean over their sum: k for k equal ones.
    """
    s = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    p = s[s > 0] / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def power_spectrum(columns: np.ndarray) -> np.ndarray:
    """Share of the variance of each column at 1, 2, ... T // 2 cycles over the T positions: (T // 2, columns)."""
    power = np.abs(np.fft.rfft(columns - columns.mean(axis=0), axis=0)[1:]) ** 2
    if len(columns) % 2 == 0:
        power[-1] /= 2  # every other frequency stands for itself and its mirror image
    total = power.sum(axis=0)
    return power / np.where(total > 0, total, 1)


def dominant_frequencies(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strongest frequency of each column, in cycles over the positions, and its share of the variance."""
    power = power_spectrum(columns)
    return power.argmax(axis=0) + 1, power.max(axis=0)


def subspace_angle(rows: np.ndarray, others: np.ndarray, n_components: int = 10) -> float:
    """Mean principal angle, in degrees, between the directions in which two sets of rows vary most.

    90 where the two share no direction, 0 where they vary in the same ones.

    Args:
        rows: (T, d).
        others: (V, d), V may be large.
        n_components: Leading principal components of each that span its subspace.
    """
    n = min(n_components, len(rows) - 1, rows.shape[1])
    mine = principal_components(rows)[2][:n]  # (n, d)
    centred = others - others.mean(axis=0)
    theirs = np.linalg.eigh((centred.T @ centred).astype(np.float64))[1][:, -n:]  # (d, n)
    cosines = np.linalg.svd(mine @ theirs, compute_uv=False)
    return float(np.degrees(np.arccos(np.clip(cosines, 0, 1))).mean())


def measures(rows: np.ndarray, tokens: np.ndarray | None = None) -> dict[str, float]:
    """All of it, by name.

    Args:
        rows: A position matrix, (T, d).
        tokens: The token embeddings of the same model, (V, d); without them there is no angle to measure.
    """
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
