"""Metrics of answers that cite references: similarity to a gold answer, citations, repetition; bootstrap intervals.

The metrics of citations follow ALCE (Gao et al., 2023, "Enabling Large Language Models to Generate Text with
Citations", https://arxiv.org/abs/2305.14627), with one difference. ALCE uses a model of natural-language inference
to decide whether passages entail a sentence. Here, passages support a sentence if they contain half of its content
words. This needs no model and is right for copied sentences, which small models mostly write; it is wrong for negations
and paraphrases.

- Citation recall is the share of sentences that their cited passages together support. A sentence without a citation
  is not supported.
- Citation precision is the share of useful citations. A citation is useful if the passage exists, all cited passages
  together support the sentence, and the passage supports it alone or the other passages do not.

A character of Chinese or Japanese counts as a word, for these languages put no spaces between words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import regex  # `re` knows no Unicode categories

from lightning_modules.common.citation_marks import MARK, cited, without_marks

SUPPORT = 0.5  # share of the content words of a sentence that passages must contain to support it
LEVEL, N_RESAMPLES = 0.95, 1000  # of the bootstrap intervals

# A sentence with its marks, which may precede or follow the full stop: `It is so [1].`, `It is so.[1]`. After the full
# stop is a space and no lower-case letter; after that of Chinese and Japanese can be anything.
_MARKS = rf"(?:\s*{MARK})*"
_ENDS = rf"\p{{STerm}}[\"')]*{_MARKS}(?=\s+[\"'`(*]*[\p{{Lu}}\p{{Lt}}\p{{Lo}}`])|[。！？][」』”]*{_MARKS}|\s*$"
_SENTENCE = regex.compile(rf"\S.*?(?:{_ENDS})", regex.DOTALL)
_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}"  # characters that are words
_WORD = regex.compile(rf"(?V1)[{_ALONE}]|[\w\p{{N}}--[{_ALONE}]]+")
_WORD_WITH_SIGNS = regex.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+")
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        "a an and any are as at be been but by can could did do does for from had has have he her his how i if in "
        "into is it its may might more most no not of on or our she should so some such than that the their them "
        "then there these they this those to was we were what when where which who why will with would you your"
    )
)


class Scores(NamedTuple):
    """Metrics of one answer, each between 0 and 1."""

    rouge1: float  # F1 of the words that the answer shares with the gold answer (Lin, 2004)
    rouge2: float  # F1 of the pairs of neighbouring words
    rougeL: float  # F1 of the longest common subsequence of words  # noqa: N815
    citation_precision: float  # share of useful citations
    citation_recall: float  # share of sentences that their cited passages support
    missing_citation: float  # 1 if the answer cites a reference that does not exist, else 0
    repetition: float  # share of 4-grams of words that occurred before in the answer (Welleck et al., 2020)


def score(answer: str, gold: str, references: Sequence[str]) -> Scores:
    """Return the metrics of an answer; it is compared with the gold answer without the marks, such as `[1]`."""
    from torchmetrics.functional.text import rouge_score

    keys = ("rouge1", "rouge2", "rougeL")
    # The words of torchmetrics have a to z and digits only; as there, an underscore separates words.
    words_of = {"normalizer": lambda text: text.lower().replace("_", " "), "tokenizer": _WORD.findall}
    rouge = rouge_score(without_marks(answer), without_marks(gold), rouge_keys=keys, **words_of)
    words, pairs, subsequence = (float(rouge[f"{key}_fmeasure"]) for key in keys)
    missing = float(any(not 0 < number <= len(references) for number in cited(answer)))
    return Scores(words, pairs, subsequence, *citation_scores(answer, references), missing, repetition(answer))


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, each with its citation marks."""
    return [match[0].strip() for match in _SENTENCE.finditer(text)]


def content_words(text: str) -> set[str]:
    """Return the words of a text in lower case, without function words such as "the"."""
    return set(_WORD.findall(text.lower())) - _FUNCTION_WORDS


def supports(passages: Sequence[str], sentence: str) -> bool:
    """Return whether passages together contain half of the content words of a sentence, if it has any."""
    needed = content_words(without_marks(sentence))
    there = set().union(*map(content_words, passages))
    return bool(needed) and len(needed & there) >= SUPPORT * len(needed)


def citation_scores(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """Return citation precision and recall of an answer; 0 without a citation, or without a sentence."""
    n_useful = n_citations = n_supported = 0
    parts = sentences(answer)
    for sentence in parts:
        numbers = list(dict.fromkeys(cited(sentence)))
        passages = {number: references[number - 1] for number in numbers if 0 < number <= len(references)}
        is_supported = supports(list(passages.values()), sentence)
        n_supported += is_supported
        n_citations += len(numbers)
        for number, passage in passages.items() if is_supported else ():
            others = [other for key, other in passages.items() if key != number]
            n_useful += supports([passage], sentence) or not supports(others, sentence)
    return n_useful / max(1, n_citations), n_supported / max(1, len(parts))


def repetition(text: str, n: int = 4) -> float:
    """Return the share of n-grams of words that occurred before in the text."""
    words = _WORD_WITH_SIGNS.findall(text.lower())
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def lead(references: Sequence[str], n_sentences: int, number: int = 1) -> str:
    """Return the first sentences of a reference, numbered from 1, with its citation mark: a baseline for an answer."""
    first = sentences(references[number - 1])[:n_sentences] if references else []
    return " ".join(f"{without_marks(sentence).rstrip('.。')} [{number}]." for sentence in first)


def best_reference(question: str, references: Sequence[str]) -> int:
    """Return the number of the reference with most content words of the question, the first of several, or else 1."""
    asked = content_words(question)
    return 1 + int(np.argmax([len(asked & content_words(reference)) for reference in references] or [0]))


def bootstrap(sums: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float, float]:
    """Return a mean over N questions and the ends of its interval, by the percentile bootstrap (Efron, 1979).

    Args:
        sums: Sum of the values of each question, (N,); without questions the result is NaN.
        counts: Number of values of each question, (N,); `None` for 1.
    """
    counts = np.ones(len(sums)) if counts is None else counts
    if not len(sums):
        return (float("nan"),) * 3
    drawn = np.random.default_rng(0).integers(len(sums), size=(N_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(sums.sum() / counts.sum()), float(low), float(high)
