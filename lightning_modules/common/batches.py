"""The error for an entry that a batch does not have."""

import linecache
import traceback
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException


def explain_missing_entry(error: KeyError, batch: Any, reader: str) -> None:
    """Raise a `MisconfigurationException` if an error is about an entry that a batch does not have.

    Args:
        error: Error of the code that read the batch.
        batch: The batch. The code has to read it as `NAME[...]` with a name that is bound to this object.
        reader: Who read the batch, for the message.
    """
    if not isinstance(batch, Mapping):
        return
    entries = ", ".join(map(repr, batch)) or "no entry at all"
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    place = traceback.extract_tb(error.__traceback__)[-1]
    code = linecache.getline(place.filename, place.lineno or 0)[place.colno : place.end_colno]
    name = code.partition("[")[0]
    if name != code and frame.f_locals.get(name) is batch:
        raise MisconfigurationException(
            f"{reader}: the batch has no {error}, only {entries}; the dataset and its collate function make the batch"
        ) from error
