"""The error for an entry that a batch does not have."""

import linecache
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException


@contextmanager
def explained_entries(batch: Any, reader: str) -> Iterator[None]:
    """Explain a `KeyError` in the block if it is about an entry that a batch does not have.

    Args:
        batch: The batch. The code has to read it as `NAME[...]` with a name that is bound to this object.
        reader: Who reads the batch, for the message.

    Raises:
        MisconfigurationException: If the batch has no such entry.
    """
    try:
        yield
    except KeyError as error:
        if isinstance(batch, Mapping):
            _explain(error, batch, reader)
        raise


def _explain(error: KeyError, batch: Mapping[Any, Any], reader: str) -> None:
    entries = ", ".join(map(repr, batch)) or "no entry at all"
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    place = traceback.extract_tb(error.__traceback__)[-1]
    code = linecache.getline(place.filename, place.lineno or 0)[place.colno : place.end_colno]
    name = code.partition("[")[0]
    if name != code and frame.f_locals.get(name) is batch:
        raise MisconfigurationException(
            f"{reader}: the batch has no {error}, only {entries}; the dataset and its collate function make the batch"
        ) from error
