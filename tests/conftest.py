"""The real command on tiny runs: no network, no account, nothing outside the test's own folder."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
import yaml
from helpers import text, with_settings

from experiments.__main__ import main

# One thread: tiny matrices gain nothing from more, and a process that never started OpenMP's can be forked.
torch.set_num_threads(1)

Command = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own, with its own cache, and no W&B unless it asks for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["llm-train"])


@pytest.fixture
def llm_train(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process; gives its exit code and what it printed."""

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
    """Runs the command in a copy of this process that can be killed; gives its exit code, negative for a signal."""

    def run(
        *args: str | Path, prepare: Callable[[], None] = lambda: None, meanwhile: Callable[[int], None] = bool
    ) -> int:
        process = forks.start(*args, prepare=prepare)
        meanwhile(process.pid)
        process.join()
        return process.exitcode

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes the YAML of a run that takes a second: 24 steps, a validation every 8; settings go over it by key path."""
    (tmp_path / "text.txt").write_text(text(2_000))

    def write(name: str = "tiny", **settings: object) -> Path:
        config = {
            "seed_everything": 5,
            "model": {
                "class_path": "lightning_modules.decoder_pretrain.PretrainModule",
                "init_args": {"n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1},
            },
            "data": {
                "class_path": "datamodules.decoder_pretrain.PretrainDataModule",
                "init_args": {
                    "source": {
                        "class_path": "datamodules.sources.TextFiles",
                        "init_args": {"paths": str(tmp_path / "text.txt")},
                    },
                    "block_size": 16,
                    "batch_size": 4,
                    "windows": "sequential",
                    "val_fraction": 0.05,
                },
            },
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.1}},
            "lr_scheduler": {
                "class_path": "lightning_modules.optim.schedules.Cosine",
                "init_args": {"warmup": 4, "final": 0.1},
            },
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 24,
                "max_epochs": -1,
                "val_check_interval": 8,
                "check_val_every_n_epoch": None,
                "log_every_n_steps": 4,
                "callbacks+": [{"class_path": "lightning_modules.runtime.export.ExportModel"}],
            },
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
        return file

    return write
