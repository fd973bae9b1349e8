"""The three splits of a data set, and the assignment of documents to them."""

import hashlib
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

Side = Literal["train", "val", "test"]
SIDES: tuple[Side, ...] = ("train", "val", "test")


def require_fractions(val_fraction: float, test_fraction: float, where: str = "data") -> tuple[float, float]:
    """Return the two fractions, checked; `where` is their path in the configuration, for the message."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise MisconfigurationException(
            f"{where}.val_fraction {val_fraction} and {where}.test_fraction {test_fraction} must be 0 or more, and "
            "leave something to train on"
        )
    return val_fraction, test_fraction


def side_of(text: str, val_fraction: float, test_fraction: float) -> Side:
    """Return the split of a document, drawn by a hash of its text, so that equal texts share a split in every run."""
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"split").digest()) / 2**64
    if draw < test_fraction:
        return "test"
    return "val" if draw < test_fraction + val_fraction else "train"
