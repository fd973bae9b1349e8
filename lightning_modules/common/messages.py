"""Lines for the user, printed once however many processes a run has."""

import sys

from lightning_utilities.core.rank_zero import rank_zero_only


@rank_zero_only
def say(line: str) -> None:
    """Print a line to the standard error of the process with rank 0.

    Args:
        line: What to print.
    """
    print(line, file=sys.stderr)
