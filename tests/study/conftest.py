"""Sweep files whose runs are stubs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from stub_runs import GRID, OF_ANOTHER_RUN, STUB


@pytest.fixture
def in_a_run_of_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of a run of W&B's agent, and the user's project."""
    for name in (*OF_ANOTHER_RUN, "WANDB_PROJECT"):
        monkeypatch.setenv(name, "mine")


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Path]:
    """Write a sweep file whose runs are stubs. Arguments replace the keys below; `None` removes one."""
    (tmp_path / "stub.py").write_text(STUB)

    def write(file_name: str = "sweep.yaml", **keys: object) -> Path:
        content = {
            "method": "grid",
            "metric": {"name": "val/loss", "goal": "minimize"},
            "parameters": GRID,
            "command": ["${env}", "${interpreter}", "stub.py", "--run.topic=toy", "${args}"],
        } | keys
        path = tmp_path / file_name
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return path

    return write
