"""What a GPU must do: train every topic in every precision, exactly, without waiting and in little memory.

`make test-gpu` runs the tests on a GPU. Those that make sense on a CPU also run there, small, in `make test`.
"""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from gpu import workload
from gpu.callbacks import NoSync
from gpu.conftest import preset
from gpu.runs import fit
from gpu.runs import Settings
from helpers import LAST, RUNS, assert_same_weights
from shortened import ROOT, offline_experiments, run_of, shortened

from lightning_modules.base import ExperimentModule, GradientFreeModule
from lightning_modules.runtime.checkpoint import RunCheckpoint
from lightning_modules.runtime.learning_curve import read_metric
from lightning_modules.runtime.peak_flops import peak_flops

OFFLINE = offline_experiments()
TRAINED = [path for path in OFFLINE if "\noptimizer:" in path.read_text()]  # the others count, on the host


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def last(run: Path, metric: str) -> float:
    return float(read_metric(run / "metrics.csv", metric)[1][-1])


# --- every topic ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("path", OFFLINE, ids=name)
def test_every_offline_experiment_trains_on_the_gpu(llm_train, with_needs, path, precision):
    with_needs(path)
    flags = (*shortened(path), *preset("gpu"), "--trainer.precision", precision)
    done = llm_train("fit", "-c", path, *flags)
    assert done.code == 0, done.err
    summary = json.loads((run_of(path) / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["peak_gpu_memory_mib"] >= 0
    assert "MiB on the GPU at most" in done.err
    (session,) = json.loads((run_of(path) / "environment.json").read_text())
    assert session["devices"]


@pytest.mark.parametrize("path", TRAINED, ids=name)
def test_the_host_does_not_wait_for_the_device_in_a_step(llm_train, with_needs, path, on):
    with_needs(path)
    length = ("--trainer.max_steps=5", "--trainer.log_every_n_steps=100", "--trainer.limit_val_batches=1")
    checked = ("--trainer.callbacks+=gpu.callbacks.NoSync",)
    done = llm_train("fit", "-c", path, *shortened(path), *on, *length, *checked)
    assert done.code == 0, done.err
    assert NoSync.checked >= 2
