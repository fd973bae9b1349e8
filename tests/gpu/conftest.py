"""Fixtures of the tests that run on a GPU, and small on the CPU."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from shortened import ROOT, needs, run_of, shortened


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the device of a test: the CPU always, a GPU with `-m gpu`."""
    yield request.param
    if request.param == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


@pytest.fixture
def on(device: str) -> tuple[str, ...]:
    """Return the flags that move a run to the device, with its precision left alone."""
    return ("--trainer.accelerator", "gpu" if device == "cuda" else "cpu")


@pytest.fixture
def with_needs(llm_train, tmp_path_factory, monkeypatch) -> Callable[[Path], None]:
    """Return a function that makes the runs that an offline experiment needs, once in a test session, on the CPU."""
    made_before = tmp_path_factory.getbasetemp() / "needed_on_gpu"
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(made_before / "cache"))

    def make(path: Path) -> None:
        for needed in needs(path):
            run = run_of(needed)
            if not (made_before / run).exists():
                make(needed)
                done = llm_train("fit", "-c", needed, *shortened(needed))
                assert done.code == 0, done.err
                shutil.copytree(run, made_before / run)
            shutil.copytree(made_before / run, run, dirs_exist_ok=True)

    return make


def preset(name: str) -> tuple[str, Path]:
    """Return the flags of a preset."""
    return "-c", ROOT / f"experiments/trainer/{name}.yaml"
