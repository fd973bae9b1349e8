"""Figures of words."""

import numpy as np
import pytest

from lightning_modules.bengio_nlm.word_vectors import places_of_words


@pytest.mark.slow
def test_no_name_of_a_word_is_on_another_or_outside_of_the_figure():
    draw = np.random.default_rng(0)
    words = [f"word{'s' * (number % 7)}{number}" for number in range(120)]
    points = np.concatenate([draw.uniform(5, 395, (60, 2)), draw.normal(200, 8, (60, 2))])  # half of them in a heap
    found = places_of_words(words, points, (400, 400))
    assert 60 < len(found) < 120
    assert words[0] in found
    boxes = [(x, y, x + 4 * len(word), y + 8) for word, (x, y) in found.items()]  # narrower than the text
    for number, (left, bottom, right, top) in enumerate(boxes):
        assert min(left, bottom) >= 0
        assert max(right, top) <= 400
        for other in boxes[:number]:
            assert right <= other[0] or other[2] <= left or top <= other[1] or other[3] <= bottom
