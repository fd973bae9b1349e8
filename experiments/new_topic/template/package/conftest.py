"""The command in the tests: in a folder of its own, without W&B."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.__main__ import main


@pytest.fixture
def llm_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., SimpleNamespace]:
    """Return a function that runs the command, and returns its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def run(*args: str | Path) -> SimpleNamespace:
        code: int | str = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as leave:
            code = leave.code or 0
        printed = capfd.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run
