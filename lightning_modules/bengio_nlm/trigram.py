"""The interpolated trigram (Jelinek and Mercer, 1980), which Bengio et al. (2003) compare their network with.

Most trigrams are too rare for a reliable relative frequency, so it is mixed with those of shorter n-grams:

    P(w | u, v) = a_0(q) / V  +  a_1(q) P(w)  +  a_2(q) P(w | v)  +  a_3(q) P(w | u, v)

The more often a history (u, v) occurs, the more reliable are its longer n-grams. So each group of histories whose
frequencies are within a factor of e has weights of its own; the number of the group is

    q = ceil(-ln((1 + c) / T)),

where c is the number of occurrences of the history in the T words of the training text. The relative frequencies are
those of the training text; EM finds the weights on held-out text.

A weight is at least `LEAST_WEIGHT`. EM alone drives the weight of a model that never helps on the held-out text to
zero, at any speed: a word that only this model expects would then cost hundreds of nats.
"""

import numpy as np

LEAST_WEIGHT = 1e-6  # so no word is less likely than 1e-6 times what one of the models says: 14 nats more
N_GROUPS = 45  # groups of histories by the logarithm of their frequency: enough for any text that has 64-bit keys


def fit_mixture(
    probabilities: np.ndarray, groups: np.ndarray, n_groups: int, tolerance: float = 1e-7, max_steps: int = 200
) -> np.ndarray:
    """Return the weights (G, K) of a mixture that maximise the likelihood, by EM (Dempster, Laird and Rubin, 1977).

    Each weight is at least `LEAST_WEIGHT` before the weights of a group are scaled to sum to one.

    Args:
        probabilities: Probability of each of N observations by each of K models, (N, K); positive for at least one.
        groups: Group of each observation, (N,) integers below `n_groups`; each group has its own weights.
        n_groups: Number of groups, G. A group without observations has the weights of all observations together.
        tolerance: EM stops when a step gains less than this, in nats per observation.
        max_steps: Largest number of steps.
    """
    n_models = probabilities.shape[1]
    sizes = np.bincount(groups, minlength=n_groups)[:, None]  # (G, 1)
    weights = np.full((n_groups, n_models), 1 / n_models)
    before = -np.inf
    for _ in range(max_steps):
        joint = weights[groups] * probabilities  # (N, K)
        total = joint.sum(axis=1, keepdims=True)
        log_likelihood = np.log(total).mean() if len(total) else 0.0
        if log_likelihood - before < tolerance:
            break
        before = log_likelihood
        shares = joint / total  # posterior of the model, given the observation
        expected = np.stack([np.bincount(groups, shares[:, k], n_groups) for k in range(n_models)], axis=1)  # (G, K)
        overall = expected.sum(axis=0) / max(1, len(groups))
        weights = np.where(sizes > 0, expected / np.maximum(sizes, 1), overall)
    weights = np.maximum(weights, LEAST_WEIGHT)
    return weights / weights.sum(axis=1, keepdims=True)


class InterpolatedTrigram:
    """Relative frequencies of n-grams of up to three words in a text of ids (N,), and the weights of their mixture.

    Raises:
        ValueError: If the text is shorter than a trigram, or the vocabulary too large for the keys.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        if len(tokens) < 3:
            raise ValueError(f"a trigram needs a text of at least 3 tokens, got {len(tokens)}")
        if vocab_size**3 > 2**63:
            raise ValueError(f"vocab_size is {vocab_size}: the keys of its trigrams do not fit in 64 bits")
        self.vocab_size = vocab_size
        self.n_tokens = len(tokens)
        tokens = tokens.astype(np.int64)
        self.unigrams = np.bincount(tokens, minlength=vocab_size)  # (V,)
        # The key of an n-gram is the number whose digits to base V are its words.
        pairs = tokens[:-1] * vocab_size + tokens[1:]
        self.bigrams = _Counts(pairs)
        self.trigrams = _Counts(pairs[:-1] * vocab_size + tokens[2:])
        self.bigram_histories = np.bincount(tokens[:-1], minlength=vocab_size)  # occurrences before another word
        self.trigram_histories = _Counts(pairs[:-1])
        self.weights = np.full((N_GROUPS, 4), 0.25)  # of the uniform distribution, unigram, bigram and trigram

    def components(self, histories: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return the four probabilities of each target: uniform, unigram, bigram, trigram, (N, 4).

        After an unknown history, the n-gram has the probability of the next shorter one, so that each sums to one.
        `histories` are the two words before each target, the nearer one first, (N, 2); `targets` are (N,).
        """
        near, far = histories[:, 0].astype(np.int64), histories[:, 1].astype(np.int64)
        pair = far * self.vocab_size + near
        unigram = self.unigrams[targets] / self.n_tokens
        bigram = _ratio(self.bigrams[near * self.vocab_size + targets], self.bigram_histories[near], unigram)
        trigram = _ratio(self.trigrams[pair * self.vocab_size + targets], self.trigram_histories[pair], bigram)
        return np.stack([np.full(len(targets), 1 / self.vocab_size), unigram, bigram, trigram], axis=1)

    def groups(self, histories: np.ndarray) -> np.ndarray:
        """Return the group of each history (N, 2): ceil(-log((1 + c) / T)) for c occurrences in T training words."""
        seen = self.trigram_histories[histories[:, 1].astype(np.int64) * self.vocab_size + histories[:, 0]]
        return np.ceil(-np.log((1 + seen) / self.n_tokens)).astype(np.int64).clip(0)

    def fit(self, histories: np.ndarray, targets: np.ndarray) -> None:
        """Choose the weights on a held-out text; see `components` for the arguments."""
        self.weights = fit_mixture(self.components(histories, targets), self.groups(histories), N_GROUPS)

    def probabilities(self, histories: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return P(w | u, v) of each target, (N,); see `components` for the arguments."""
        return (self.weights[self.groups(histories)] * self.components(histories, targets)).sum(axis=1)


class _Counts:
    """Number of occurrences by key; 0 for other keys."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.counts = np.unique(keys, return_counts=True)

    def __getitem__(self, keys: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0)


def _ratio(part: np.ndarray, whole: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Return `part / whole`, or `otherwise` where `whole` is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), otherwise)
