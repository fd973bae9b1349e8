"""Messages to the user, printed once for all processes of a run."""

import sys

from lightning_utilities.core.rank_zero import rank_zero_only


def say(line: str) -> None:
    """Print a line to standard error, on rank 0 only.

    Lightning sets the rank when it is imported. Without Lightning there is one process.
    """
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(line, file=sys.stderr)


def first_line(error: BaseException) -> str:
    """Return the class of an exception and the first line of its message, if it has one."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
