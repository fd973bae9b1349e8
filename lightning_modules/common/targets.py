"""The target of a position that carries no loss, and the places of those that do."""

import numpy as np

IGNORED = -100  # the default `ignore_index` of torch's cross entropy
_MULTIPLE = 8  # of the number of places; matrix units of a GPU need it


def places_of_targets(targets: np.ndarray) -> np.ndarray:
    """Return the places of the targets among the B T positions of a batch, one row after another, (N,) int64.

    The loader finds them on the CPU: on a GPU, the number of targets would have to be read from it. A place without a
    target is repeated at the end, so that N is a multiple of 8, unless all places have one.

    Args:
        targets: Token ids, (B, T); `IGNORED` where there is no target.
    """
    flat = targets.ravel()
    places = np.flatnonzero(flat != IGNORED)
    n_more = -len(places) % _MULTIPLE
    if n_more and len(places) < flat.size:
        places = np.append(places, np.full(n_more, np.argmax(flat == IGNORED)))
    return places
