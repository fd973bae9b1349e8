"""Messages to the user, printed once for all processes of a run."""

import difflib
import os
import sys
from collections.abc import Collection

from lightning_utilities.core.rank_zero import rank_zero_only

ERASE_LINE = "\r\x1b[K"  # of a terminal
MOST_LISTED = 6


def on_terminal() -> bool:
    """Return whether standard error is a terminal that can write over a line."""
    return not sys.stderr.closed and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def say(line: str) -> None:
    """Print a line to standard error, on rank 0 only; in a terminal, in place of a line about the progress.

    Lightning sets the rank when it is imported. Without Lightning there is one process.
    """
    if getattr(rank_zero_only, "rank", 0) == 0:
        print((ERASE_LINE if on_terminal() else "") + line, file=sys.stderr)


def listed(names: Collection[str], like: str = "") -> str:
    """Return names for a line: all of them, or a few and the number of the others.

    Args:
        names: The names, in the order in which they are listed.
        like: Name that those of a few resemble most; by default they are the first.
    """
    n_others = len(names) - MOST_LISTED
    if n_others <= 0:
        return ", ".join(names)
    few = difflib.get_close_matches(like, names, MOST_LISTED, cutoff=0.0) if like else [*names][:MOST_LISTED]
    return f"{', '.join(few)} and {n_others:,} others"


def first_line(error: BaseException) -> str:
    """Return the class of an exception and the first line of its message, if it has one."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
