"""The metrics of style against values worked out by hand."""

import math

import pytest

from lightning_modules.gpt_neo_style.style import (
    BookStyle,
    common_shapes,
    distinct_n,
    layout_share,
    line_shape,
    longest_copy,
    sentence_length,
    vocabulary_overlap,
    words,
)


def test_words_are_lower_case_and_keep_apostrophes_and_hyphens():
    assert words("Don’t -- the well-known O'Hara, 3 _times_!") == ["don’t", "the", "well-known", "o'hara", "times"]


def test_distinct_n_counts_ngrams_in_windows_of_one_length():
    tokens = list("ababcdefx")
    assert distinct_n(tokens, 1, window=4) == pytest.approx((2 / 4 + 4 / 4) / 2)  # abab, cdef; x fills no window
    assert distinct_n(tokens, 2, window=4) == pytest.approx((2 / 3 + 3 / 3) / 2)  # ab ba ab, cd de ef
    assert distinct_n(["a", "a"], 1, window=50) == 0.5  # a short text is one window
    assert math.isnan(distinct_n(["a"], 2))


@pytest.mark.parametrize(
    ("line", "shape"),
    [
        ("QUILL.", ("none", "CAPITALS", ".", 0)),
        (" [Exit.]", ("little", "[", "]", 0)),
        ("And never once been told that one has come", ("none", "capital", "letter", 2)),
        ('    "If you will," said the clock,', ("much", "quote", ",", 1)),
        ("I, who am I?", ("none", "capital", "?", 0)),
        ("I", ("none", "capital", "letter", 0)),  # one letter alone does not count as capitals
        ("x" * 81, ("none", "small", "letter", 4)),
    ],
)
def test_the_shape_of_a_line(line, shape):
    assert line_shape(line) == shape


def test_the_layout_of_a_book_is_the_shapes_of_many_of_its_lines():
    play = "TIDE.\nI come and go again.\n\n" * 300 + "one odd line"
    shapes = common_shapes(play)
    assert shapes == {line_shape("TIDE."), line_shape("I come and go again.")}  # the odd one is one in 601
    assert layout_share("QUILL.\n\ndef quill():\nYou come too late.\n    return 1\n", shapes) == 0.5
    assert math.isnan(layout_share("\n\n", shapes))


def test_vocabulary_overlap_is_of_distinct_words():
    assert vocabulary_overlap(["the", "the", "the", "moth", "of", "x"], {"the", "of", "and"}) == 0.5


def test_sentences_end_at_marks_and_blank_lines():
    assert sentence_length('One two. "Three?" Four five six\n\nSeven') == pytest.approx((2 + 1 + 3 + 1) / 4)
    assert sentence_length("3.14 is pi") == 2.0  # a point inside a number ends nothing


def test_the_longest_copy_is_found_anywhere_in_the_source():
    source = words("Once upon a time there was a sea, and there was a bell.")
    assert longest_copy(words("So there was a bell upon a hill."), source) == ["there", "was", "a", "bell"]
    assert longest_copy(["nothing"], source) == []
    assert longest_copy(source, source) == source
    assert longest_copy([], source) == []


def test_texts_are_compared_with_a_book():
    book = BookStyle("TIDE.\nI come and go again.\n" * 20)
    found = book.evaluate(["TIDE.\nwe come and stay", "I go again."])
    assert found["layout"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["vocabulary_overlap"] == pytest.approx((3 / 5 + 1) / 2)
    assert found["sentence_length"] == pytest.approx(((1 + 4) / 2 + 3) / 2)
    assert found["longest_copy"] == 2.0
    assert book.longest_copy(["TIDE.\nwe come and stay", "and go again, TIDE"]) == ["and", "go", "again", "tide"]
