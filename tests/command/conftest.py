"""The parser of `fit`, built once for the tests that parse many configurations, and runs that experiments read."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from shortened import needs, run_of, shortened

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


@pytest.fixture
def make_what_it_needs(llm_train, tmp_path_factory, monkeypatch) -> Callable[[Path], None]:
    """Return a function that makes the runs that a YAML needs, and before them the runs that those need.

    A YAML names them in lines `# Needs: llm-train fit -c FILE`. A run, and the data that it reads, is made once in a
    test session.
    """
    made_before = tmp_path_factory.getbasetemp() / "made_before"
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(made_before / "cache"))

    def make(path: Path) -> None:
        for needed in needs(path):
            make_one(path, needed)

    def make_one(path: Path, needed: Path) -> None:
        run, command = run_of(needed), f"llm-train fit -c {needed.parent.name}/{needed.stem}"
        if not (made_before / run).exists():
            missing = llm_train("fit", "-c", path, *shortened(path))
            # The error for a missing input names the command.
            assert (missing.code, command in missing.err) == (1, True), missing.err
            make(needed)
            made = llm_train("fit", "-c", needed, *shortened(needed))
            assert made.code == 0, made.err
            shutil.copytree(run, made_before / run)
        shutil.copytree(made_before / run, run, dirs_exist_ok=True)

    return make


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save empty pictures: drawing takes most of the time of a small run or comparison."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
