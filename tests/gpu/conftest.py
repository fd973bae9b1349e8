"""Fixtures of the tests that run on a GPU, and small on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shortened import ROOT


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


def preset(name: str) -> tuple[str, Path]:
    """Return the flags of a preset."""
    return "-c", ROOT / f"experiments/trainer/{name}.yaml"
