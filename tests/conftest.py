"""The real command on tiny runs: no network, no account, nothing outside the test's own folder."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import torch
import yaml
from safetensors.torch import load_file

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


def kill_when(seen: Callable[[], bool], signal_number: int = signal.SIGKILL) -> Callable[[int], None]:
    """For `forked(meanwhile=...)`: sends a signal as soon as something is seen."""

    def watch(child: int) -> None:
        deadline = time.monotonic() + 120
        while not seen() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child, signal_number)

    return watch


def text(n_words: int, seed: int = 0) -> str:
    """Sentences of made-up words that a model can learn something about."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioumnrst", k=draw.randint(2, 6))) for _ in range(50)]
    return " ".join(draw.choice(words) + ("." if draw.random() < 0.1 else "") for _ in range(n_words))


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
                "callbacks+": [{"class_path": "lightning_modules.callbacks.export.ExportModel"}],
            },
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
        return file

    return write


def with_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Puts settings over a configuration: `trainer__max_steps=8` is `max_steps` of its section `trainer`."""
    for path, value in settings.items():
        *parents, last = path.split("__")
        section = config
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    return config


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, or in a file of safetensors."""
    if checkpoint.suffix == ".safetensors":
        return load_file(checkpoint)
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def assert_close_weights(one: Path, other: Path) -> None:
    """To the rounding of sums that processes share; Adam, which divides by small roots, makes it grow a little."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4, msg=f"{one} {name}")


def metrics_that_repeat(run: Path) -> list[list[str]]:
    """The columns' names and the rows of a run's metrics, but for how fast it was."""
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(lines[0]) if not name.startswith("perf/")]
    return [[line[i] for i in kept] for line in lines]
