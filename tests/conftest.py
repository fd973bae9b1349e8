"""The real command on tiny runs: no network, no account, and no file outside the folder of the test.

Torch and Lightning are imported within functions: the process that distributes the tests to others reads this file too.
"""

import gc
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from shared_runs import own_world, run_command
from shortened import needs, run_of, shortened

from experiments.__main__ import main

Command = Callable[..., SimpleNamespace]

# One thread: tiny matrices gain nothing from more, and a process that has not started OpenMP's can be forked. The
# variable is for NumPy's library, which is not imported yet, and for processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

gc.disable()  # while the tests and the libraries are imported


def pytest_collectstart() -> None:
    """Set the threads of torch, whatever has imported it."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave the objects of the imported libraries out of garbage collections, and make this process one to copy.

    If the first backward pass is one of fake tensors and torch is built for GPUs, it starts threads, and then no copy
    of this process can train.
    """
    import torch

    torch.ones(1, requires_grad=True).sum().backward()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path) -> Iterator[None]:
    """Give each test a working folder, a cache, modules and random numbers of its own, and disable W&B."""
    import torch

    torch.manual_seed(0)
    imported = set(sys.modules)
    with own_world(tmp_path):
        yield
    for name in sys.modules.keys() - imported:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def llm_train(capfd: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command in this process, and returns its exit code and output."""

    def run(*args: str | Path) -> SimpleNamespace:
        capfd.readouterr()
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as leave:
            code = leave.code or 0
        printed = capfd.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def forked() -> Callable[..., int]:
    """Return a function that runs the command in a copy of this process, and returns its exit code.

    The copy can be killed. The exit code is then the number of the signal with a minus sign.
    """
    import forks

    def run(*args: str | Path, prepare: Callable[[], None] = bool) -> int:
        process = forks.start(*args, prepare=prepare)
        process.join()
        return process.exitcode

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the YAML of a run of a second: 24 steps, a validation every 8.

    Settings replace values by their key path, see `with_settings`.
    """
    from helpers import text, write_tiny

    (tmp_path / "text.txt").write_text(text(2_000))

    def write(name: str = "tiny", **settings: object) -> Path:
        return write_tiny(tmp_path / f"{name}.yaml", tmp_path / "text.txt", settings)

    return write


@pytest.fixture
def whole(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that returns the folder of an uninterrupted run of the tiny YAML with some settings.

    The run is made once in a test session; tests read it or copy it.
    """
    from helpers import RUNS

    def make(**settings: object) -> Path:
        digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
        folder = tmp_path_factory.getbasetemp() / "whole" / digest[:16]
        run = folder / RUNS / "whole"
        if not (run / "summary.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            config = tiny("whole", **settings)
            with own_world(folder):
                done = run_command("fit", "-c", config)
            assert done.code == 0, done.err
        return run

    return make


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
