"""How good an answer is that cites its references: nearness to a gold answer, citations, repetition, intervals.

Citations are judged as Gao et al. (2023, "Enabling Large Language Models to Generate Text with Citations", ALCE,
https://arxiv.org/abs/2305.14627) judge them, but for one thing. They ask a model of natural-language inference whether
passages entail a sentence. Here passages support a sentence if they contain half of its content words. That needs no
model and is right about sentences that are taken over, which is most of what small models do; it cannot see a negation,
and it does not know a paraphrase.

- citation recall: share of the sentences that the passages they cite, together, support. A sentence without a citation
  is not supported.
- citation precision: share of the citations that are of use: the passage exists, the sentence is supported by all it
  cites, and the passage either supports it alone or is needed, since the others do not.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SUPPORT = 0.5  # share of a sentence's content words that passages must contain to support it

_MARK = re.compile(r"\s*\[(\d+)\]")
# A sentence with the marks that follow it: `It is so [1].`, and `It is so.[1]` too.
_SENTENCE = re.compile(r"\S.*?(?:[.!?][\"')]*(?:\s*\[\d+\])*(?=\s+[\"'`(*]*[A-Z`])|\s*$)", re.DOTALL)
_WORD = re.compile(r"\w+")
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        "a an and any are as at be been but by can could did do does for from had has have he her his how i if in "
        "into is it its may might more most no not of on or our she should so some such than that the their them "
        "then there these they this those to was we were what when where which who why will with would you your"
    )
)


class Scores(NamedTuple):
    """Measures of one answer, each between 0 and 1.

    Args:
        rouge1: F1 of the words that it shares with the gold answer (Lin, 2004).
        rouge2: F1 of the pairs of neighbouring words.
        rougeL: F1 of the longest common subsequence of words.
        citation_precision: Share of its citations that are of use.
        citation_recall: Share of its sentences that what they cite supports.
        missing_citation: 1 if it cites a reference that is not there, else 0.
        repetition: Share of its runs of four words that it has said before (Welleck et al., 2020).
    """

    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815
    citation_precision: float
    citation_recall: float
    missing_citation: float
    repetition: float


def score(answer: str, gold: str, references: Sequence[str]) -> Scores:
    """Measures an answer.

    Args:
        answer: With citation marks such as `[1]`.
        gold: The right answer; marks are left out of what is compared.
        references: What the marks count, from 1.
    """
    from torchmetrics.functional.text import rouge_score

    keys = ("rouge1", "rouge2", "rougeL")
    rouge = rouge_score(without_marks(answer), without_marks(gold), rouge_keys=keys)
    precision, recall = citation_scores(answer, references)
    return Scores(
        *(float(rouge[f"{key}_fmeasure"]) for key in keys),
        citation_precision=precision,
        citation_recall=recall,
        missing_citation=float(any(not 0 < number <= len(references) for number in cited(answer))),
        repetition=repetition(answer),
    )


def cited(text: str) -> list[int]:
    """The numbers that a text cites, in order."""
    return [int(number) for number in _MARK.findall(text)]


def without_marks(text: str) -> str:
    """A text without its citation marks, and the space before them."""
    return _MARK.sub("", text)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its citation marks."""
    return [match[0].strip() for match in _SENTENCE.finditer(text)]


def content_words(text: str) -> set[str]:
    """The words of a text that mean something by themselves, in lower case."""
    return set(_WORD.findall(text.lower())) - _FUNCTION_WORDS


def supports(passages: Sequence[str], sentence: str) -> bool:
    """Whether passages together contain half of a sentence's content words; nothing supports a sentence without any."""
    needed = content_words(without_marks(sentence))
    there = set().union(*map(content_words, passages))
    return bool(needed) and len(needed & there) >= SUPPORT * len(needed)


def citation_scores(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """Citation precision and recall of an answer; 0 where it has no citation, or no sentence."""
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
    """Share of a text's runs of `n` words that occurred in it before."""
    words = text.lower().split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def lead(references: Sequence[str], n_sentences: int, number: int = 1) -> str:
    """The first sentences of a reference, with its mark: what an answer must be better than.

    Args:
        references: Passages; without any, nothing is said.
        n_sentences: How many sentences.
        number: Which reference, counted from 1.
    """
    first = sentences(references[number - 1])[:n_sentences] if references else []
    return " ".join(f"{without_marks(sentence).rstrip('.')} [{number}]." for sentence in first)


def best_reference(question: str, references: Sequence[str]) -> int:
    """The number of the reference that shares most content words with the question; the first of several, 1 of none."""
    asked = content_words(question)
    return 1 + int(np.argmax([len(asked & content_words(reference)) for reference in references] or [0]))


def bootstrap(
    sums: np.ndarray, counts: np.ndarray | None = None, level: float = 0.95, n_resamples: int = 1000
) -> tuple[float, float, float]:
    """A mean over questions, and the interval in which it lies if other questions of the kind were asked.

    The percentile bootstrap (Efron, 1979): questions are drawn again with replacement, as many as there are.

    Args:
        sums: Of each question, (N,).
        counts: What the sum of a question is over, (N,); `None` for 1.
        level: Share of the resampled means that lie within the interval.
        n_resamples: How often the questions are drawn.

    Returns:
        The mean, and the two ends of the interval; not a number without questions.
    """
    counts = np.ones(len(sums)) if counts is None else counts
    if not len(sums):
        return (float("nan"),) * 3
    drawn = np.random.default_rng(0).integers(len(sums), size=(n_resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(sums.sum() / counts.sum()), float(low), float(high)
