"""The parser of `fit`, built once for the tests that parse many configurations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from experiments.cli import ExperimentCLI
from experiments.parser import ExperimentParser


class _BuiltError(Exception):
    """Carries the command out of its constructor, which would parse next."""


class _Parsers(ExperimentCLI):
    def parse_arguments(self, parser: ExperimentParser, args: Sequence[str]) -> NoReturn:
        raise _BuiltError(self)


@pytest.fixture(scope="session")
def fit_cli() -> ExperimentCLI:
    """Return the command `fit` before it parses."""
    with pytest.raises(_BuiltError) as caught:
        _Parsers(["fit"])
    return caught.value.args[0]


@pytest.fixture(scope="session")
def parse(fit_cli: ExperimentCLI) -> Callable[..., dict[str, Any]]:
    """Return a function that parses a command line of `fit`, as the command does, and returns its arguments."""

    def run(*args: str | Path) -> dict[str, Any]:
        return fit_cli.parser.parse_args(list(map(str, args))).as_dict()["fit"]

    return run
