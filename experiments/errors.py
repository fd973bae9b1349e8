"""The errors of the commands that do without Lightning."""

import argparse
import sys
from typing import Any, NoReturn


class UserError(Exception):
    """A user's mistake, told in one line that says what, where and what to do.

    Commands that import Lightning raise its `MisconfigurationException`, as Lightning itself does; its import takes
    seconds, which `study` and `compare` have no other use for.
    """


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line too, and that takes no abbreviations.

    Args:
        **kwargs: As for `ArgumentParser`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Prints one line and leaves with exit code 2."""
        print(f"error: {self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)
