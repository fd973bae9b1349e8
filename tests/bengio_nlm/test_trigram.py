"""The interpolated trigram and EM, compared with sums computed by hand."""

from itertools import pairwise

import numpy as np
import pytest

from lightning_modules.bengio_nlm.trigram import N_GROUPS, InterpolatedTrigram, fit_mixture

TEXT = np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 0, 2])  # a b c a b d a b c a c
HISTORY_AB = np.array([[1, 0]])  # after "a b", the nearer word first


def test_relative_frequencies_by_hand():
    trigram = InterpolatedTrigram(TEXT, vocab_size=5)
    # P(c) = 3/11; of the 3 words after b two are c; of the 3 after "a b" two are c
    assert trigram.components(HISTORY_AB, np.array([2])) == pytest.approx(np.array([[1 / 5, 3 / 11, 2 / 3, 2 / 3]]))
    # P(c | a) = 1/4; after "c a" once b, once c
    assert trigram.components(np.array([[0, 2]]), np.array([2])) == pytest.approx(
        np.array([[1 / 5, 3 / 11, 1 / 4, 1 / 2]])
    )
    # the last word has no follower: its second occurrence is no history
    assert trigram.components(np.array([[2, 1]]), np.array([0]))[0, 2] == 1.0


def test_an_unknown_history_is_replaced_by_the_next_shorter_one():
    trigram = InterpolatedTrigram(TEXT, vocab_size=5)
    _, _, bigram, after_d_b = trigram.components(np.array([[1, 3]]), np.array([2]))[0]
    assert after_d_b == bigram == pytest.approx(2 / 3)
    assert len(set(trigram.components(np.array([[4, 4]]), np.array([2]))[0, 1:])) == 1  # all are the unigram


@pytest.mark.parametrize("history", [[1, 0], [0, 2], [1, 3], [4, 4], [3, 1]])
def test_every_component_and_the_mixture_sum_to_one(history):
    trigram = InterpolatedTrigram(TEXT, vocab_size=5)
    histories, words = np.array([history] * 5), np.arange(5)
    assert trigram.components(histories, words).sum(axis=0) == pytest.approx(np.ones(4))
    trigram.fit(np.array([[1, 0], [0, 3], [2, 1]]), np.array([2, 1, 0]))
    assert trigram.probabilities(histories, words).sum() == pytest.approx(1)


def test_histories_are_grouped_by_the_order_of_magnitude_of_their_frequency():
    trigram = InterpolatedTrigram(TEXT, vocab_size=5)
    histories = np.array([[1, 0], [0, 2], [3, 1], [4, 4]])  # seen 3, 2, 1 and 0 times in 11 words
    expected = [np.ceil(-np.log((1 + c) / 11)) for c in (3, 2, 1, 0)]
    assert trigram.groups(histories).tolist() == expected == [2, 2, 2, 3]
    assert trigram.groups(histories).max() < N_GROUPS


def test_one_step_of_em_by_hand():
    probabilities = np.array([[0.8, 0.2], [0.3, 0.1], [0.1, 0.9]])
    weights = fit_mixture(probabilities, np.zeros(3, int), n_groups=1, max_steps=1)
    # from equal weights the first model has 0.8 / 1.0, 0.3 / 0.4 and 0.1 / 1.0 of each observation
    assert weights == pytest.approx(np.array([[1.65 / 3, 1.35 / 3]]))


def test_a_word_that_the_held_out_text_lacks_stays_possible():
    trigram = InterpolatedTrigram(np.array([0, 1, 2] * 50), vocab_size=5)
    trigram.fit(np.array([[1, 0]] * 100), np.array([2] * 100))  # the uniform distribution never helps
    assert trigram.weights.min() > 0.9e-6
    assert trigram.weights.sum(axis=1) == pytest.approx(np.ones(N_GROUPS))
    (unseen,) = np.log(trigram.probabilities(np.array([[1, 0]]), np.array([4])))
    assert np.log(1e-6 / 5) - 1e-3 < unseen < np.log(1e-6 / 5) + 1


def test_em_never_lowers_the_likelihood_and_finds_its_maximum():
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.01, 1, (400, 2))
    groups = np.zeros(400, int)

    def log_likelihood(weights: np.ndarray) -> float:
        return np.log(probabilities @ weights).sum()

    path = [log_likelihood(fit_mixture(probabilities, groups, 1, 0, steps)[0]) for steps in range(12)]
    assert all(later >= earlier for earlier, later in pairwise(path))
    assert path[-1] > path[0]
    grid = np.linspace(0, 1, 1001)
    best = max(log_likelihood(np.array([w, 1 - w])) for w in grid)
    assert log_likelihood(fit_mixture(probabilities, groups, 1, 1e-12, 1000)[0]) == pytest.approx(best, abs=1e-3)


def test_each_group_has_its_own_weights_and_an_empty_one_those_of_all():
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.1, 0.9]])
    weights = fit_mixture(probabilities, np.array([0, 0, 0, 2]), n_groups=3)
    assert weights[0] == pytest.approx([1, 0], abs=1e-3)
    assert weights[2] == pytest.approx([0, 1], abs=1e-3)
    assert weights[1] == pytest.approx([0.75, 0.25], abs=1e-3)


def test_the_more_often_a_history_was_seen_the_more_its_trigram_weighs():
    rng = np.random.default_rng(0)
    frequent_first = 1 / np.arange(1, 21)
    table = rng.dirichlet(frequent_first, size=(20, 20))  # each word depends on the two before it
    words = [0, 1]
    for _ in range(6_000):
        words.append(rng.choice(20, p=table[words[-2], words[-1]]))
    text, held_out = np.array(words[:4_000]), np.array(words[4_000:])
    trigram = InterpolatedTrigram(text, 20)
    histories, targets = np.stack([held_out[1:-1], held_out[:-2]], axis=1), held_out[2:]
    before = -np.log(trigram.probabilities(histories, targets)).mean()
    trigram.fit(histories, targets)
    assert -np.log(trigram.probabilities(histories, targets)).mean() < before
    often, once_or_twice = trigram.groups(histories).min(), int(np.ceil(-np.log(2 / len(text))))
    assert trigram.weights[often, 3] > 0.9 > 0.5 > trigram.weights[once_or_twice, 3]


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "message"), [([0, 1], 2, "at least 3"), ([0, 1, 2], 2_200_000, "do not fit in 64 bits")]
)
def test_texts_that_cannot_be_counted_are_refused(tokens, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        InterpolatedTrigram(np.array(tokens), vocab_size)
