"""Held-out fractions, and the rule that sends a document to a split."""

from collections import Counter

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.splits import SIDES, require_fractions, side_of


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
