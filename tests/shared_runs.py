"""The real command outside of a test function, for runs that several tests look at."""

import contextlib
import io
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from experiments.__main__ import main
from lightning_modules.common.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_curves: dict[object, bytes] = {}  # learning curves that this process has drawn, by what is in them


@contextlib.contextmanager
def own_world(folder: Path) -> Iterator[None]:
    """Work in a folder with a cache of its own, without the hub, and without W&B unless a test asks for it.

    A learning curve with the same axes as an earlier one is a copy of its file: drawing takes a quarter of a tiny run.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LLM_TRAIN_CACHE", str(folder / "cache"))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setattr(sys, "argv", ["llm-train"])
        patch.setattr("lightning_modules.runtime.learning_curve.save_figure", _save_figure_once)
        yield
        if (wandb := sys.modules.get("wandb")) and wandb.run is not None:  # left by a test in which W&B fails
            wandb.finish()
        if torch := sys.modules.get("torch"):  # `trainer.deterministic` holds for the process, and so for later tests
            torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def temporary_world() -> Iterator[None]:
    """For a benchmark: work in a temporary folder as a test does, on one thread."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, own_world(Path(folder)):
        yield


def _save_figure_once(figure: "Figure", file: Path) -> Path:
    (axes,) = figure.axes
    lines = [(line.get_label(), all(map(math.isfinite, line.get_ydata()))) for line in axes.get_lines()]
    content = (axes.get_xlabel(), axes.get_ylabel(), *lines, len(axes.texts))
    if content in _curves:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_curves[content])
    elif drawn := save_figure(figure, file).read_bytes():  # nothing where a test draws no pictures
        _curves[content] = drawn
    return file


def run_command(*args: str | Path) -> SimpleNamespace:
    """Run the command in this process; return its exit code and what it printed."""
    code: int | str = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main([str(arg) for arg in args])
        except SystemExit as leave:
            code = leave.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
