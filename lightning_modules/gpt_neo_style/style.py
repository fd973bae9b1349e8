"""What style is, measured on plain text: how varied, how laid out, in whose words, and how much of it is copied."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|\n\s*\n")
_LENGTHS = (20, 40, 60, 80)  # characters; the shape of a line knows between which of them it is
_COMMON = 0.005  # share of a book's lines that makes a shape one of its own


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and numbers."""
    return _WORD.findall(text.lower())


def distinct_n(tokens: Sequence[str], n: int, window: int = 50) -> float:
    """Share of n-grams that are distinct (Li et al., 2016), as the mean over windows of equal length.

    The share falls with the length of a text, so that only windows of one length compare (as in the moving-average
    type-token ratio of Covington and McFall, 2010).

    Args:
        tokens: Words of a text.
        n: Words in an n-gram, at least 1.
        window: Words in a window, at least `n`; a shorter text is one window.

    Returns:
        The share, 0 to 1; not a number for a text of fewer than `n` words.
    """
    starts = range(0, max(1, len(tokens) - window + 1), window)
    shares = []
    for start in starts:
        part = tokens[start : start + window]
        grams = [tuple(part[i : i + n]) for i in range(len(part) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return _mean(shares)


def line_shape(line: str) -> tuple[str, str, str, int]:
    """How a line looks, whatever it says: indentation, first character, last character, length.

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


def common_shapes(text: str) -> set[tuple[str, str, str, int]]:
    """The shapes that many of a book's lines have: its layout."""
    counts = Counter(line_shape(line) for line in _lines(text))
    return {shape for shape, count in counts.items() if count >= _COMMON * counts.total()}


def layout_share(text: str, shapes: set[tuple[str, str, str, int]]) -> float:
    """Share of the lines of a text that have one of these shapes, 0 to 1; not a number where there is no line."""
    return _mean([line_shape(line) in shapes for line in _lines(text)])


def vocabulary_overlap(tokens: Iterable[str], known: set[str]) -> float:
    """Share of the distinct words of a text that are known, 0 to 1; not a number where there is no word."""
    return _mean([word in known for word in set(tokens)])


def sentence_length(text: str) -> float:
    """Mean number of words in a sentence; blank lines end one, too. Not a number where there is no word."""
    return _mean([n for sentence in _SENTENCE_END.split(text) if (n := len(words(sentence)))])


def longest_copy(tokens: Sequence[str], source: Sequence[str]) -> list[str]:
    """The longest run of words of a text that stands in another text, too; the first of several.

    Args:
        tokens: Words of the text.
        source: Words of the text that may have been copied from.
    """

    def copied(n: int) -> int | None:
        there = {tuple(source[i : i + n]) for i in range(len(source) - n + 1)}
        return next((i for i in range(len(tokens) - n + 1) if tuple(tokens[i : i + n]) in there), None)

    low, high = 0, min(len(tokens), len(source))  # a copied run of n words holds one of every smaller length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if copied(middle) is not None else (low, middle - 1)
    start = copied(low) or 0
    return list(tokens[start : start + low])


@dataclass(frozen=True)
class BookStyle:
    """A book as the yardstick for other texts.

    Args:
        shapes: The shapes of its lines.
        vocabulary: Its words.
        text: All of its words, in order.
    """

    shapes: set[tuple[str, str, str, int]]
    vocabulary: set[str]
    text: list[str]

    @classmethod
    def of(cls, text: str) -> "BookStyle":
        """The style of a book."""
        tokens = words(text)
        return cls(common_shapes(text), set(tokens), tokens)

    def measure(self, texts: Sequence[str]) -> dict[str, float]:
        """The measures of some texts beside this book, by name; each is a mean over the texts, the copy the longest.

        Args:
            texts: The texts.
        """
        tokens = [words(text) for text in texts]
        measures = {
            "distinct_1": [distinct_n(one, 1) for one in tokens],
            "distinct_2": [distinct_n(one, 2) for one in tokens],
            "layout": [layout_share(text, self.shapes) for text in texts],
            "vocabulary_overlap": [vocabulary_overlap(one, self.vocabulary) for one in tokens],
            "sentence_length": [sentence_length(text) for text in texts],
        }
        means = {name: _mean([value for value in values if value == value]) for name, values in measures.items()}
        return means | {"longest_copy": float(len(self.longest_copy(texts)))}

    def longest_copy(self, texts: Sequence[str]) -> list[str]:
        """The longest run of words of any of the texts that is copied from the book."""
        return max((longest_copy(words(text), self.text) for text in texts), key=len, default=[])


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
