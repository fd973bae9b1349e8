"""The real command outside of a test function, for runs that several tests look at."""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.__main__ import main


@contextlib.contextmanager
def own_world(folder: Path) -> Iterator[None]:
    """Work in a folder with a cache of its own, without the hub, and without W&B unless a test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LLM_TRAIN_CACHE", str(folder / "cache"))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setattr(sys, "argv", ["llm-train"])
        yield


def run_command(*args: str | Path) -> SimpleNamespace:
    """Run the command in this process; return its exit code and what it printed."""
    code: int | str = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main([str(arg) for arg in args])
        except SystemExit as leave:
            code = leave.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
