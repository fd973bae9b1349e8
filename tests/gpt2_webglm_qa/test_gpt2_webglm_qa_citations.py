"""The metrics of an answer: overlap with the gold answer, citations, repetition, and confidence intervals."""

import re

import numpy as np
import pytest
from torchmetrics.functional.text import rouge_score

from lightning_modules.common.citation_marks import MARK, cited, renumber, without_marks
from lightning_modules.gpt2_webglm_qa.citations import (
    best_reference,
    bootstrap,
    citation_scores,
    lead,
    repetition,
    score,
    sentences,
    supports,
)

SKY = "The sky is blue because molecules scatter short waves most."
SEA = "The sea is salty because rivers bring minerals."


def test_sentences_keep_the_marks_that_follow_them():
    text = "It is so [1]. It was so.[2][3] `f` is (e.g. 3.5) so! And so [4]"
    assert sentences(text) == ["It is so [1].", "It was so.[2][3]", "`f` is (e.g. 3.5) so!", "And so [4]"]
    assert without_marks(text) == "It is so. It was so. `f` is (e.g. 3.5) so! And so"


@pytest.mark.parametrize(
    ("text", "numbers", "plain"),
    [
        ("It is so[1], and so [2][3].", [1, 2, 3], "It is so, and so."),
        ("Read `row[1]` [2].", [2], "Read `row[1]`."),
        ("Read ``a`[1]`` [2] `b[3]`", [2], "Read ``a`[1]`` `b[3]`"),
        ("Run\n```python\nx[1] = y[2]\n```\n[3]", [3], "Run\n```python\nx[1] = y[2]\n```"),
        ("Run\n```\nx[1]", [], "Run\n```\nx[1]"),  # cut off within the code
        ("A lone ` is no code [1].", [1], "A lone ` is no code."),
        ("[0] [01] [1, 2] [1-2] [[1]] [١] [１] ［1］ [¹]", [], "[0] [01] [1, 2] [1-2] [[1]] [١] [１] ［1］ [¹]"),
        (f"So [{'9' * 5000}].", [], f"So [{'9' * 5000}]."),
        (f"So{' ' * 100_000}[1]", [1], "So"),
    ],
)
def test_marks_are_numbers_in_brackets_outside_of_code(text, numbers, plain):
    assert cited(text) == numbers
    assert without_marks(text) == plain
    assert renumber(text, lambda number: number) == text


def test_half_of_the_content_words_support_a_sentence():
    assert supports([SKY], "Molecules scatter blue waves [1].")
    assert supports(["molecules and waves"], "Molecules scatter blue waves.")
    assert not supports(["molecules"], "Molecules scatter blue waves.")
    assert not supports([SKY], "It is so.")  # no content word
    assert not supports([], "Molecules scatter.")


@pytest.mark.parametrize(
    ("answer", "precision", "recall"),
    [
        ("Molecules scatter short waves [1]. Rivers bring minerals [2].", 1, 1),
        ("Molecules scatter short waves [2]. Rivers bring minerals [2].", 1 / 2, 1 / 2),  # the first is not supported
        ("Molecules scatter short waves [1][2].", 1 / 2, 1),  # the second is not needed
        ("Molecules scatter waves while rivers bring minerals down here today [1][2].", 1, 1),  # both are
        ("Molecules scatter short waves [1]. Rivers bring minerals.", 1, 1 / 2),  # nothing is cited
        ("Molecules scatter short waves [1][7].", 1 / 2, 1),  # the seventh is not there
        ("Molecules scatter short waves [1][1].", 1, 1),  # said twice, counted once
        ("Molecules scatter short waves.", 0, 0),
        ("", 0, 0),
    ],
)
def test_citations_as_alce_judges_them(answer, precision, recall):
    assert citation_scores(answer, [SKY, SEA]) == (precision, recall)


def test_rouge_by_hand_without_the_marks():
    scores = score("the cat sat [9]", "the cat ran away [1]", ["cat"])
    # three and four words: two shared words, one shared pair, a common subsequence of two
    assert scores.rouge1 == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert scores.rouge2 == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert scores.rougeL == scores.rouge1
    assert scores.missing_citation == 1
    assert score("the cat sat [1]", "the", ["cat"]).missing_citation == 0
    assert score("", "the", []).rougeL == 0


@pytest.mark.parametrize(
    ("answer", "gold", "shared"),
    [
        ("Москва — столица России [1].", "москва, столица России", 1),
        ("Größe zählt", "Grüße zählt", 1 / 2),
        ("Müller kam früh.", "Möller kam fröh.", 1 / 3),
        ("हिन्दी भाषा", "हिन्दी भाषा", 1),
        ("東京は首都です。", "東京が首都です。", 6 / 7),  # each character is a word
        ("用 PyTorch 训练 2 层", "用 PyTorch 训练 3 层", 5 / 6),
    ],
)
def test_rouge_counts_the_words_of_all_scripts(answer, gold, shared):
    scores = score(answer, gold, [])
    assert (scores.rouge1, scores.rougeL) == pytest.approx((shared, shared))


ENGLISH = [
    "The cat's tail isn't 3.5 cm long [1]. It was so.[2] (e.g. so) And (so) it is!",
    "Call `os.path.join(a_b, *__c)`; `x[1]` is 1e-3. `f` returns None.\n\nThen 50% of them -- and more -- ran?  2 ran.",
    'He said "No." She did not. "Why?" he asked... *Nobody* knew: U.S. troops, Mr. Smith, a.m. and p.m.',
    "",
]


@pytest.mark.parametrize("text", ENGLISH)
def test_words_and_sentences_of_english_are_those_of_torchmetrics_and_ascii(text):
    ascii_sentence = rf"\S.*?(?:[.!?][\"')]*(?:\s*{MARK})*(?=\s+[\"'`(*]*[A-Z`])|\s*$)"
    assert sentences(text) == [found[0].strip() for found in re.finditer(ascii_sentence, text, re.DOTALL)]
    for gold in ENGLISH:
        theirs = rouge_score(without_marks(text), without_marks(gold), rouge_keys=("rouge1", "rouge2", "rougeL"))
        assert score(text, gold, [])[:3] == tuple(float(theirs[f"rouge{n}_fmeasure"]) for n in "12L")


def test_sentences_of_other_scripts_end_too():
    assert sentences("Москва большая [1]. Река течёт [2].") == ["Москва большая [1].", "Река течёт [2]."]
    assert sentences("Es ist z. B. so. Über Öl.[1]") == ["Es ist z.", "B. so.", "Über Öl.[1]"]
    assert sentences("यह सच है [1]। वह नहीं।") == ["यह सच है [1]।", "वह नहीं।"]
    assert sentences("東京は首都です[1]。川が流れる。[2] 「はい。」") == [
        "東京は首都です[1]。",
        "川が流れる。[2]",
        "「はい。」",
    ]
    assert citation_scores("Москва большая [1]. Река течёт [2].", ["Москва большая", "река"]) == (1, 1)
    assert lead(["東京は首都です。川が流れる。"], 1) == "東京は首都です [1]."


def test_repetition_is_the_share_of_runs_said_before():
    assert repetition("a b c d e f") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("no no no no no no") == pytest.approx(2 / 3)
    assert repetition("too short") == 0
    assert repetition("東京東京東京") == pytest.approx(1 / 3)


def test_the_two_rules():
    references = [SEA + " It is so. And so.", "Nothing [3]. " + SKY]
    assert lead(references, 2) == f"{SEA[:-1]} [1]. It is so [1]."
    assert best_reference("Why is the sky blue?", references) == 2
    assert lead(references, 1, 2) == "Nothing [2]."
    assert (lead([], 2), best_reference("Why?", [])) == ("", 1)


def test_bootstrap_intervals_hold_the_mean_as_often_as_they_say():
    draw = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        mean, low, high = bootstrap(draw.exponential(2.0, size=80))
        assert low < mean < high
        held += low < 2.0 < high
    assert 175 <= held <= 200  # 95 % of 200 is 190
    assert bootstrap(np.array([1.0, 3.0]), np.array([1.0, 1.0]))[0] == 2.0
    assert bootstrap(np.array([1.0, 3.0]), np.array([1.0, 3.0])) == (1.0, 1.0, 1.0)
    assert np.isnan(bootstrap(np.array([]))).all()
