"""Errors of users, for commands that do not import Lightning."""

import argparse
import difflib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

# Modules that are not of the user, wherever their files are; installed ones are in the folders below.
_NOT_OF_USER = {"__main__", "experiments", "lightning_modules", "datamodules", *sys.stdlib_module_names}
_INSTALLED = {"site-packages", "dist-packages"}
_BUILDERS = ("jsonargparse.", "lightning.pytorch.cli")  # modules that call the constructors of a configuration


class UserError(Exception):
    """A mistake of the user. The message is one line that says what is wrong, where, and what to do.

    Commands that import Lightning raise its `MisconfigurationException`, as Lightning does. The others save the seconds
    that its import takes.
    """


class UsageError(UserError):
    """A mistake in the command line itself; the command exits with code 2."""


def module_that_raised(error: BaseException) -> str:
    """Return the name of the module whose code has raised an exception."""
    places = [place for place, _ in traceback.walk_tb(error.__traceback__)]
    return str(places[-1].f_globals.get("__name__", "")) if places else ""


def is_of_user(place: FrameType) -> bool:
    """Return whether the code of a frame is of the user, and neither of this project nor of an installed package."""
    file, module = Path(place.f_code.co_filename), str(place.f_globals.get("__name__"))
    return file.suffix == ".py" and not _INSTALLED & {*file.parts} and module.split(".")[0] not in _NOT_OF_USER


def place_in_users_code(error: BaseException) -> str | None:
    """Return the file and line of the last code of the user that an error has passed, or `None` if there is none."""
    passed = [(place, line) for place, line in traceback.walk_tb(error.__traceback__) if is_of_user(place)]
    return f"{passed[-1][0].f_code.co_filename}, line {passed[-1][1]}" if passed else None


def raised_by_constructor(error: BaseException) -> BaseException | None:
    """Return what a constructor has raised, with its own frames, if an error repeats it in the words of jsonargparse.

    Those are dozens of lines: the types that were tried, and all arguments of the class.
    """
    if not module_that_raised(error).startswith(_BUILDERS):
        return None
    raised = next((found for found in causes(error) if not module_that_raised(found).startswith(_BUILDERS)), None)
    place = raised.__traceback__ if raised else None
    while place and str(place.tb_frame.f_globals.get("__name__")).startswith(_BUILDERS):
        place = place.tb_next
    return raised.with_traceback(place) if raised else None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that it comes from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def did_you_mean(word: Any, candidates: Iterable[str]) -> str:
    """Return a hint at the candidate that is most like the word, or nothing if none is."""
    close = difflib.get_close_matches(str(word), candidates, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def count(text: str) -> int:
    """Return the number that an option of a command gives, which counts something: the type of `add_argument`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


class CommandParser(argparse.ArgumentParser):
    """A parser that prints errors in one line and accepts no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print one line, with a similar word if one is probably misspelt, and exit with code 2."""
        found = re.search(r"unrecognized arguments: --([\w-]+)|invalid choice: '([^']+)' \(choose from (.*)\)", message)
        hint = "see --help"
        if found:
            typed = f"--{found[1].replace('-', '_')}" if found[1] else found[2]
            known = re.findall(r"--\w+", self.format_help()) if found[1] else re.findall(r"[\w-]+", found[3])
            longer = [word for word in known if word.startswith(typed)]  # an abbreviation has few letters in common
            close = longer or difflib.get_close_matches(typed, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else hint
        print(f"error: {self.prog}: {message} ({hint})", file=sys.stderr)
        raise SystemExit(2)
