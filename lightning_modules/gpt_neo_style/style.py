"""Metrics of style on plain text: variety, layout, vocabulary, and passages copied from another text."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

Shape = tuple[str, str, str, int]

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|\n\s*\n")
_LENGTHS = (20, 40, 60, 80)  # characters; bounds of the classes of line lengths
_COMMON = 0.005  # smallest share of the lines of a book for a shape that is part of its layout


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and numbers."""
    return _WORD.findall(text.lower())


def distinct_n(tokens: Sequence[str], n: int, window: int = 50) -> float:
    """Return the share of n-grams that are distinct (Li et al., 2016), the mean over windows of equal length.

    The share falls with the length of a text, so only windows of one length are comparable (as in the moving-average
    type-token ratio of Covington and McFall, 2010). A shorter text is one window. The result is NaN for fewer than `n`
    words.
    """
    shares = []
    for start in range(0, max(1, len(tokens) - window + 1), window):
        part = tokens[start : start + window]
        if grams := [tuple(part[i : i + n]) for i in range(len(part) - n + 1)]:
            shares.append(len(set(grams)) / len(grams))
    return _mean(shares)


def line_shape(line: str) -> Shape:
    """Return the shape of a line: classes of its indentation, first character, last character and length."""
    text = line.strip()
    indentation = len(line) - len(line.lstrip())
    indent = "none" if not indentation else "little" if indentation <= 2 else "much"
    letters = [character for character in text if character.isalpha()]
    if len(letters) > 1 and all(character.isupper() for character in letters):
        first = "CAPITALS"
    elif text[0].isalpha():
        first = "capital" if text[0].isupper() else "small"
    else:
        first = "quote" if text[0] in "\"'“‘" else text[0]
    last = "letter" if text[-1].isalnum() else text[-1]
    return indent, first, last, sum(len(text) > length for length in _LENGTHS)


def common_shapes(text: str) -> set[Shape]:
    """Return the layout of a book: the shapes that many of its lines have."""
    counts = Counter(map(line_shape, _lines(text)))
    return {shape for shape, count in counts.items() if count >= _COMMON * counts.total()}


def layout_share(text: str, shapes: set[Shape]) -> float:
    """Return the share of the lines of a text that have one of the shapes, 0 to 1; NaN if all lines are blank."""
    return _mean([line_shape(line) in shapes for line in _lines(text)])


def vocabulary_overlap(tokens: Iterable[str], known: set[str]) -> float:
    """Return the share of the distinct words of a text that are known, 0 to 1; NaN without words."""
    return _mean([word in known for word in set(tokens)])


def sentence_length(text: str) -> float:
    """Return the mean number of words in a sentence, NaN without words. A blank line ends a sentence too."""
    return _mean([n for sentence in _SENTENCE_END.split(text) if (n := len(words(sentence)))])


def longest_copy(tokens: Sequence[str], source: Sequence[str]) -> list[str]:
    """Return the longest sequence of words that two texts share, the first of several."""
    match = SequenceMatcher(None, tokens, source, autojunk=False).find_longest_match()
    return list(tokens[match.a : match.a + match.size])


class BookStyle:
    """The style of a book, for comparison with other texts."""

    def __init__(self, text: str) -> None:
        self.shapes = common_shapes(text)
        self.tokens = words(text)
        self.vocabulary = set(self.tokens)

    def evaluate(self, texts: Sequence[str]) -> dict[str, float]:
        """Return the metrics of texts by name: means over the texts without NaN, and the length of the longest copy."""
        tokens = [words(text) for text in texts]
        metrics = {
            "distinct_1": [distinct_n(one, 1) for one in tokens],
            "distinct_2": [distinct_n(one, 2) for one in tokens],
            "layout": [layout_share(text, self.shapes) for text in texts],
            "vocabulary_overlap": [vocabulary_overlap(one, self.vocabulary) for one in tokens],
            "sentence_length": [sentence_length(text) for text in texts],
        }
        means = {name: _mean([value for value in values if value == value]) for name, values in metrics.items()}
        return means | {"longest_copy": float(len(self.longest_copy(texts)))}

    def longest_copy(self, texts: Sequence[str]) -> list[str]:
        """Return the longest sequence of words that one of the texts shares with the book."""
        return max((longest_copy(words(text), self.tokens) for text in texts), key=len, default=[])


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
