"""Held-out fractions, and the rule that sends a document to a split."""

from collections import Counter

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.sources import ListText, Piece, Source
from datamodules.splits import FEW, SIDES, SplitDocuments, describe, groups_of, require_fractions, side_of, sides_of


@pytest.mark.parametrize("fractions", [(0.0, 0.0), (0.5, 0.49), (0.0, 0.99)])
def test_fractions_that_leave_something_to_train_on(fractions):
    assert require_fractions(*fractions) == fractions


@pytest.mark.parametrize("fractions", [(-0.1, 0.0), (0.0, -0.1), (0.5, 0.5), (1.0, 0.0)])
def test_other_fractions_are_refused_by_their_names(fractions):
    message = rf"data.records.val_fraction {fractions[0]} and data.records.test_fraction {fractions[1]} must be 0 or"
    with pytest.raises(MisconfigurationException, match=message):
        require_fractions(*fractions, "data.records")


def test_a_split_has_about_its_fraction_of_the_documents_and_copies_share_one():
    documents = [f"document {i}" for i in range(2000)]
    sides = [side_of(document, 0.2, 0.1) for document in documents]
    assert sides == [side_of(document, 0.2, 0.1) for document in documents]
    counts = Counter(sides)
    assert set(counts) == set(SIDES)
    assert counts["val"] == pytest.approx(400, rel=0.2)
    assert counts["test"] == pytest.approx(200, rel=0.2)
    assert {side_of(document, 0.0, 0.0) for document in documents} == {"train"}


def test_documents_are_in_the_splits_of_earlier_versions():
    sides = [side_of(f"document {i}", 0.2, 0.2) for i in range(12)]
    test, val, train = "test", "val", "train"
    assert sides == [test, val, test, val, train, val, val, val, test, train, train, test]


def test_few_texts_have_the_fractions_exactly_and_copies_share_a_split():
    texts = [f"text {i % 30}" for i in range(60)]
    sides = sides_of(texts, 0.1, 0.2)
    assert Counter(sides.values()) == {"train": 21, "val": 3, "test": 6}
    assert sides == sides_of(reversed(texts), 0.1, 0.2)
    assert set(sides_of(["a", "b", "c"], 0.1, 0.1).values()) == set(SIDES)
    assert set(sides_of(texts, 0.0, 0.0).values()) == {"train"}
    assert Counter(sides_of(["a", "b"], 0.1, 0.1).values()) == {"train": 1, "val": 1}  # one is left to train on
    assert Counter(sides_of(["a", "b", "c"], 0.6, 0.3).values()) == {"train": 1, "val": 2}
    assert sides_of(["a"], 0.1, 0.1) == {"a": "train"}
    assert sides_of([], 0.1, 0.1) == {}


# --- few documents ---------------------------------------------------------------------------------------------------


def parts(documents, *fractions, split="auto"):
    """Return the texts of each split: documents, or parts of them."""
    found = {side: [""] for side in SIDES}
    for side, (text, ends) in SplitDocuments(ListText(documents), split, *fractions):
        found[side][-1] += text
        if ends:
            found[side].append("")
    return {side: [text for text in texts if text] for side, texts in found.items()}


LINES = "".join(f"line {number} of the text\n" for number in range(9000))  # several pieces


@pytest.mark.parametrize("fractions", [(0.1, 0.0), (0.1, 0.2), (0.0, 0.1), (0.01, 0.3)])
@pytest.mark.parametrize("documents", [[LINES], [LINES, LINES[:1000], LINES[LINES.index("line 99 ") :]]])
def test_the_end_of_each_of_few_documents_is_held_out(documents, fractions):
    found = parts(documents, *fractions)
    asked = {"train": 1 - sum(fractions), "val": fractions[0], "test": fractions[1]}
    for number, document in enumerate(documents):
        of_document = [found[side][number] for side in SIDES if asked[side]]
        assert "".join(of_document) == document
        smallest = min(fraction for fraction in fractions if fraction) * len(document)
        # Cut where a line begins, unless that moves the cut by more than half of a part.
        assert smallest < 50 or all(part.startswith("line ") for part in of_document)
        for side, part in zip([side for side in SIDES if asked[side]], of_document, strict=True):
            assert len(part) / len(document) == pytest.approx(asked[side], abs=0.5 * max(fractions) / 2 + 0.001)
    assert not any(found[side] for side in SIDES if not asked[side])


@pytest.mark.parametrize("text", ["abcdefghij", "word and word and more words of one line", "a\n" + "b" * 100])
def test_a_text_without_lines_is_cut_all_the_same(text):
    found = parts([text], 0.2)
    assert "".join(found["train"] + found["val"]) == text
    assert 0 < len(found["val"][0]) <= 0.3 * len(text) + 1


def test_many_documents_are_split_as_ever():
    documents = [f"document {number}" for number in range(FEW + 30)]
    for fractions in ((0.2, 0.1), (0.0, 0.0)):
        assert parts(documents, *fractions) == parts(documents, *fractions, split="documents")
    assert parts(documents, 0.2, 0.1)["test"] == [text for text in documents if side_of(text, 0.2, 0.1) == "test"]


def test_documents_that_leave_a_split_empty_are_cut():
    documents = [f"document {number}: a text" for number in range(FEW + 1)]
    assert len(parts(documents, 0.2)["val"]) < len(documents)
    found = parts(documents, 0.001 + 0.2, 1e-9)
    assert [len(found[side]) for side in ("train", "val")] == [len(documents)] * 2


class Endless(Source):
    """A source of more documents than can be counted."""

    def pieces(self):
        number = 0
        while True:
            yield Piece(f"document {number}", True)
            number += 1

    def fingerprint(self):
        return ""


def test_no_more_is_read_than_decides_the_split():
    assert SplitDocuments(Endless(), "auto", 0.1, 0.1).few is None


@pytest.mark.parametrize(
    ("split", "documents", "fractions", "line"),
    [
        ("parts", (1, 0, 0), (0.1, 0.0), "1 document, 2.0 MB: the first 90 % trains, the last 10 % validates"),
        (
            "parts",
            (3, 3, 3),
            (0.05, 0.1),
            "3 documents, 2.0 MB: the first 85 % of each trains, the next 5 % of each validates, the last 10 % of each "
            "is for the test",
        ),
        ("tail", (40, 0, 0), (0.1, 0.0), "40 documents, 2.0 MB: the first 90 % trains, the last 10 % validates"),
        ("documents", (900, 80, 20), (0.1, 0.0), "1,000 documents, 2.0 MB: 900 train, 80 validate (25.0% of the text)"),
        ("documents", (1, 0, 0), (0.0, 0.0), "1 document, 2.0 MB: all of it trains"),
    ],
)
def test_the_line_about_a_split(split, documents, fractions, line):
    sizes = {"train": 1_400_000, "val": 500_000, "test": 100_000}
    assert describe(split, dict(zip(SIDES, documents, strict=True)), sizes, *fractions) == line


# --- near copies -----------------------------------------------------------------------------------------------------


def document(number, n_lines=10):
    return "".join(f"document {number}, line {line}: a line that has forty characters\n" for line in range(n_lines))


def test_documents_that_share_half_of_their_long_lines_are_a_group():
    half = "".join(document(0).splitlines(True)[5:] + document(7).splitlines(True)[:5])
    part = "".join(document(2).splitlines(True)[:4] + ["short\n"] * 30)
    little = "".join(document(2).splitlines(True)[6:] + document(8).splitlines(True))
    documents = [document(0), document(1), document(2), half, part, little, document(1) + "One more.", "a\n", " a", "b"]
    assert groups_of(documents) == [0, 1, 2, 0, 2, 5, 1, 7, 7, 9]


def test_a_group_grows_by_each_of_its_documents():
    lines = [document(number).splitlines(True) for number in range(3)]
    chain = ["".join(lines[0] + lines[1]), "".join(lines[1] + lines[2]), "".join(lines[2]), document(4)]
    assert groups_of(chain) == [0, 0, 0, 3]


def test_lines_of_many_documents_make_no_group():
    licence = "".join(f"line {line} of a licence that many documents have\n" for line in range(30))
    groups = groups_of([licence + document(number, 5) for number in range(40)])
    assert groups == list(range(40))


def test_any_number_of_copies_are_a_group_but_not_documents_that_are_little_more_than_a_long_line_of_many():
    assert groups_of(["x" * 50] * 11) == groups_of(["short\n"] * 11) == [0] * 11
    licence = "".join(f"line {line} of a licence that many documents have\n" for line in range(30))
    text = licence + document(0, 20)
    drafts = [f"{text}draft {number} has a long line of its own at the end\n" for number in range(12)]
    others = [licence + document(number, 20) for number in range(1, 101)]
    assert groups_of(others[:60] + drafts + others[60:]) == [*range(60), *[60] * 12, *range(72, 112)]
    footer = "A poem of a collection that all of these are from.\n"
    poems = ["".join(f"poem {number}, verse {verse}\n" for verse in range(9)) + footer for number in range(40)]
    assert groups_of(poems) == list(range(40))


def test_near_copies_share_a_split_and_the_others_stay_where_they_were():
    documents = [document(number) for number in range(60)]
    copies = [document(number) + "And some more.\n" for number in range(60)]
    found = parts([*documents, *copies], 0.2, 0.1, split="groups")
    alone = parts(documents, 0.2, 0.1, split="documents")
    for side in SIDES:
        assert found[side][: len(alone[side])] == alone[side]
        assert found[side][len(alone[side]) :] == [text + "And some more.\n" for text in alone[side]]
