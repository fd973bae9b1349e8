"""Lines for the user, printed once however many processes a run has."""

import sys

from lightning_utilities.core.rank_zero import rank_zero_only


def say(line: str) -> None:
    """Print a line to standard error, on rank 0 only.

    Without Lightning, which sets the rank when it is imported, there is one process.
    """
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(line, file=sys.stderr)
