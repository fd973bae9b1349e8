"""Metrics of style on plain text: variety, layout, vocabulary, and passages copied from another text."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

Shape = tuple[str, str, str, int]

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|\n\s*\n")
_LENGTHS = (20, 40, 60, 80)  # characters; bounds of the classes of line lengths
_COMMON = 0.005  # share of a book's lines that a shape needs to be part of the book's layout


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and numbers.

    Args:
        text: Any text.
    """
    return _WORD.findall(text.lower())


def distinct_n(tokens: Sequence[str], n: int, window: int = 50) -> float:
    """Return the share of n-grams that are distinct (Li et al., 2016), the mean over windows of equal length.

    The share falls with the length of a text, so only windows of one length are comparable (as in the moving-average
    type-token ratio of Covington and McFall, 2010).

    Args:
        tokens: Words of a text.
        n: Words in an n-gram, at least 1.
        window: Words in a window, at least `n`; a shorter text is one window.

    Returns:
        The share, 0 to 1; NaN for a text of fewer than `n` words.
    """
    starts = range(0, max(1, len(tokens) - window + 1), window)
    shares = []
    for start in starts:
        part = tokens[start : start + window]
        grams = [tuple(part[i : i + n]) for i in range(len(part) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return _mean(shares)


def line_shape(line: str) -> Shape:
    """Return the shape of a line: classes of its indentation, first character, last character and length.

    Args:
        line: A line that is not blank.
    """
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
    """Return the layout of a book: the shapes that many of its lines have.

    Args:
        text: The book.
    """
    counts = Counter(map(line_shape, _lines(text)))
    return {shape for shape, count in counts.items() if count >= _COMMON * counts.total()}


def layout_share(text: str, shapes: set[Shape]) -> float:
    """Return the share of lines that have one of some shapes, 0 to 1; NaN if all lines are blank.

    Args:
        text: Any text.
        shapes: Such as those of `common_shapes`.
    """
    return _mean([line_shape(line) in shapes for line in _lines(text)])


def vocabulary_overlap(tokens: Iterable[str], known: set[str]) -> float:
    """Return the share of the distinct words of a text that are known, 0 to 1; NaN without words.

    Args:
        tokens: Words of the text.
        known: Known words.
    """
    return _mean([word in known for word in set(tokens)])


def sentence_length(text: str) -> float:
    """Return the mean number of words in a sentence, NaN without words. A blank line ends a sentence too.

    Args:
        text: Any text.
    """
    return _mean([n for sentence in _SENTENCE_END.split(text) if (n := len(words(sentence)))])


def longest_copy(tokens: Sequence[str], source: Sequence[str]) -> list[str]:
    """Return the longest sequence of words that two texts share, the first of several.

    Args:
        tokens: Words of a text.
        source: Words of the text that may have been copied from.
    """
    match = SequenceMatcher(None, tokens, source, autojunk=False).find_longest_match()
    return list(tokens[match.a : match.a + match.size])


@dataclass(frozen=True)
class BookStyle:
    """The style of a book, with which other texts are compared.

    Args:
        shapes: Shapes of its lines.
        vocabulary: Its distinct words.
        tokens: All its words in order.
    """

    shapes: set[Shape]
    vocabulary: set[str]
    tokens: list[str]

    @classmethod
    def of(cls, text: str) -> "BookStyle":
        """Return the style of a book.

        Args:
            text: The book.
        """
        tokens = words(text)
        return cls(common_shapes(text), set(tokens), tokens)

    def evaluate(self, texts: Sequence[str]) -> dict[str, float]:
        """Return the metrics of some texts by name: means over the texts, and the length of the longest copy of all.

        Args:
            texts: The texts. A text for which a metric is NaN is left out of its mean.
        """
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
        """Return the longest sequence of words that any of some texts shares with the book.

        Args:
            texts: The texts.
        """
        return max((longest_copy(words(text), self.tokens) for text in texts), key=len, default=[])


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
