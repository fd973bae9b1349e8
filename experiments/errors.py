"""Errors of users, for commands that do not import Lightning."""

import argparse
import sys
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake of the user. The message is one line that says what is wrong, where, and what to do.

    Commands that import Lightning raise its `MisconfigurationException`, as Lightning does. The others save the seconds
    that its import takes.
    """


class UsageError(UserError):
    """A mistake in the command line itself; the command exits with code 2."""


class CommandParser(argparse.ArgumentParser):
    """A parser that prints errors in one line and accepts no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        print(f"error: {self.prog}: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)
