"""Faults of long runs: a full disk, a failure of W&B, the end of the time on a cluster, an infinite loss."""

import ast
import importlib
import inspect
import json
import os
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZipFile

import lightning as L
import pytest
import torch
from helpers import LAST, RUNS, assert_same_weights, metrics_that_repeat
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.base import ExperimentModule
from lightning_modules.runtime.checkpoint import RunCheckpoint
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.loggers import MetricsCSV
from lightning_modules.runtime.sharded import FullyShardedStrategy, require_whole_weights
from lightning_modules.runtime.stop import StopOnNonFiniteLoss

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "experiments/trainer/slurm.sbatch"


def methods_that_need_whole_weights() -> list[tuple[str, str, str]]:
    """Return module, class and method of each call of `require_whole_weights`."""
    found = []
    for file in sorted((ROOT / "lightning_modules").rglob("*.py")):
        if "require_whole_weights(" not in file.read_text():
            continue
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for owner in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)):
            for method in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
                if "require_whole_weights(" in ast.unparse(method):
                    found.append((module, owner.name, method.name))
    return found


NEED_WHOLE_WEIGHTS = methods_that_need_whole_weights()


@pytest.mark.parametrize(("module", "owner", "method"), NEED_WHOLE_WEIGHTS, ids=str)
def test_a_callback_that_needs_whole_weights_refuses_a_sharded_run(module, owner, method):
    refusing = getattr(importlib.import_module(module), owner)
    call = getattr(refusing.__new__(refusing), method)
    _, *others = ("fit" if name == "stage" else None for name in inspect.signature(call).parameters)
    expected = rf"{owner} needs whole weights.*ddp\.yaml in place of fsdp"
    with pytest.raises(MisconfigurationException, match=expected):
        call(SimpleNamespace(strategy=FullyShardedStrategy()), *others)


def test_a_run_that_is_not_sharded_has_whole_weights():
    assert len(NEED_WHOLE_WEIGHTS) > 1
    require_whole_weights(SimpleNamespace(strategy=None), "Callback")


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (0, False), (1, False)])
def test_the_batch_file_requeues_a_job_whose_time_is_up(tmp_path, code, requeued):
    for name, script in {"srun": f'echo "$@" > srun.txt; exit {code}', "scontrol": 'echo "$@" > scontrol.txt'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_NNODES": "3"}
    done = subprocess.run(["bash", SBATCH, "-c", "x.yaml"], env=environment, check=False)
    assert done.returncode == code
    assert Path("srun.txt").read_text() == "llm-train fit -c x.yaml --trainer.num_nodes 3 --auto_resume\n"
    assert Path("scontrol.txt").exists() == requeued
    if requeued:
        assert Path("scontrol.txt").read_text() == "requeue 17\n"


@pytest.mark.slow
def test_a_disk_that_is_full_when_metrics_are_written_ends_the_run_with_one_line(llm_train, tiny, whole, monkeypatch):
    config = tiny()
    add, still_to_fail = MetricsCSV._add, [12, 24]  # steps: in the run, and after its last validation

    def full(self: MetricsCSV, rows: list) -> None:
        if rows and rows[-1]["step"] in still_to_fail:
            still_to_fail.remove(rows[-1]["step"])
            raise OSError(28, "No space left on device")
        add(self, rows)

    monkeypatch.setattr(MetricsCSV, "_add", full)
    command = ("fit", "-c", config, "--run.name", "named", "--auto_resume")
    for _ in range(2):
        failed = llm_train(*command)
        assert failed.code == 1
        line = failed.err.splitlines()[-1]
        assert line.startswith("error: [Errno 28] No space left on device: the metrics could not be")
        assert "metrics.csv" in line
        assert '"failed"' in (RUNS / "named/summary.json").read_text()
    with (RUNS / "named/metrics.csv").open("a") as file:
        file.write("24,2")  # what had room of the last row
    done = llm_train(*command)  # no step is left
    assert (done.code, "finished at step 24" in done.err) == (0, True), done.err
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (RUNS / "named", whole()))
    for summary in (ours, theirs):
        for name in ("seconds", "peak_memory_mib"):
            del summary[name]
        del summary["metrics"]["perf/tokens_per_second"]
    assert ours == theirs
    assert_same_weights(whole() / LAST, RUNS / "named" / LAST)
    assert metrics_that_repeat(RUNS / "named") == metrics_that_repeat(whole())


def test_a_disk_that_is_full_when_a_checkpoint_is_written_keeps_the_earlier_one(monkeypatch):
    checkpoints, file = AtomicCheckpointIO(), Path("checkpoints/last.ckpt")
    checkpoints.save_checkpoint({"state_dict": {}, "global_step": 8}, file)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*the earlier one is whole.*last\.ckpt"):
        checkpoints.save_checkpoint({"state_dict": {}, "global_step": 16}, file)
    assert checkpoints.load_checkpoint(file)["global_step"] == 8
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_mode_of_a_checkpoint_follows_the_umask(umask):
    before = os.umask(umask)
    try:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, Path("last.ckpt"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("last.ckpt").stat().st_mode) == 0o666 & ~umask


def test_a_cache_that_cannot_be_written_costs_one_line(llm_train, tiny, monkeypatch):
    Path("occupied").write_text("")
    monkeypatch.setenv("LLM_TRAIN_CACHE", "occupied/cache")
    failed = llm_train("fit", "-c", tiny())
    assert failed.code == 1
    assert "occupied/cache" in failed.err.splitlines()[-1]
    assert "$LLM_TRAIN_CACHE" in failed.err.splitlines()[-1]


@pytest.mark.slow
def test_a_run_continues_without_wandb_if_that_fails(llm_train, tiny, monkeypatch):
    logged = []

    def log_metrics(self: WandbLogger, metrics: dict, step: int | None = None) -> None:
        logged.append(step)
        if len(logged) > 1:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(WandbLogger, "log_metrics", log_metrics)
    done = llm_train("fit", "-c", tiny(trainer__max_steps=12))
    assert done.code == 0
    assert "W&B failed (ConnectionResetError: Connection lost): the run goes on without it" in done.err.splitlines()
    assert [row[0] for row in metrics_that_repeat(RUNS / "tiny")] == ["step", "4", "8", "12"]


def test_a_failure_computes_no_metric_because_the_other_processes_may_not_have_failed(llm_train, tiny, monkeypatch):
    failures, read = [], []  # whether the run had failed when Lightning was asked for its metrics
    compute = L.Trainer.callback_metrics.fget

    def fail(self: ExperimentModule) -> None:
        failures.append(RuntimeError("on this process"))
        raise failures[0]

    def metrics(self: L.Trainer) -> dict[str, torch.Tensor]:
        read.append(bool(failures))
        return compute(self)

    monkeypatch.setattr(ExperimentModule, "on_validation_epoch_end", fail)
    monkeypatch.setattr(L.Trainer, "callback_metrics", property(metrics))
    with pytest.raises(RuntimeError, match="on this process"):
        llm_train("fit", "-c", tiny(trainer__num_sanity_val_steps=0))
    assert read
    assert not any(read)
    summary = json.loads((RUNS / "tiny/summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["metrics"]["train/loss"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value):
    stop, checkpoint = StopOnNonFiniteLoss(), RunCheckpoint()
    for outputs in (None, torch.tensor(1.0), {"loss": torch.tensor(1.0)}):
        stop.on_train_batch_end(after_step(2), None, outputs, None, 0)
    for kept in ("there is no checkpoint yet", "the last good checkpoint was kept"):
        with pytest.raises(MisconfigurationException, match=f"not finite at step 3: .*; {kept}$"):
            stop.on_train_batch_end(after_step(3, checkpoint), None, {"loss": torch.tensor(value)}, None, 0)
        Path(LAST).parent.mkdir(exist_ok=True)
        Path(LAST).touch()


def after_step(
    step: int, *checkpoints: RunCheckpoint, accumulates: bool = False, world_size: int = 1
) -> SimpleNamespace:
    """Return what the callback reads of a trainer, which logs every second step."""
    return SimpleNamespace(
        global_step=step,
        world_size=world_size,
        log_every_n_steps=2,
        checkpoint_callbacks=checkpoints,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: accumulates),
    )


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_no_checkpoint_has_a_trained_weight_that_is_not_finite(value):
    module = torch.nn.ParameterList([torch.tensor([1.0, 2.0]), torch.tensor([1.0, value]), torch.zeros(0)])
    module[1].requires_grad = False
    stop = StopOnNonFiniteLoss()
    stop.on_save_checkpoint(after_step(4), module, {})
    module[1].requires_grad = True
    with pytest.raises(MisconfigurationException, match="a weight was not finite after step 5"):
        stop.on_save_checkpoint(after_step(5), module, {})


def test_no_process_writes_a_checkpoint_if_another_finds_a_bad_number_and_all_have_its_reason(monkeypatch):
    found = "a weight was not finite after step 4"
    monkeypatch.setattr("lightning_modules.runtime.stop.gathered", lambda trainer, own: [own, found])
    with pytest.raises(MisconfigurationException, match=found):
        StopOnNonFiniteLoss().on_save_checkpoint(after_step(4, world_size=2), torch.nn.Linear(1, 1), {})


@pytest.mark.parametrize(
    ("value", "of_the_other", "found"), [(float("nan"), "", "at step 2"), (1.0, "a loss at step 3", "a loss at step 3")]
)
def test_processes_read_their_losses_and_stop_together(monkeypatch, value, of_the_other, found):
    monkeypatch.setattr("lightning_modules.runtime.stop.gathered", lambda trainer, own: [own, of_the_other])
    stop = StopOnNonFiniteLoss(every_n_steps=3)
    for step, loss in enumerate([1.0, value, 1.0], start=1):  # a process that stopped now would leave the others behind
        stop.on_train_batch_end(after_step(step, world_size=2), None, {"loss": torch.tensor(loss)}, None, 0)
    with pytest.raises(MisconfigurationException, match=found):
        stop.on_train_batch_end(after_step(4, world_size=2), None, {"loss": torch.tensor(1.0)}, None, 0)


class Elsewhere(torch.Tensor):
    """A tensor that claims to be on a GPU; one on the device `meta` would have no value to read."""

    device = SimpleNamespace(type="cuda")


def loss_elsewhere(value: float) -> dict[str, torch.Tensor]:
    """Return what a training step returns on a GPU."""
    return {"loss": torch.tensor(value).as_subclass(Elsewhere)}


def test_a_loss_on_another_device_is_read_when_metrics_are_logged_and_before_a_checkpoint():
    stop = StopOnNonFiniteLoss(every_n_steps=4)
    for step, value in enumerate([1.0, float("nan"), 1.0], start=1):
        stop.on_train_batch_end(after_step(step), None, loss_elsewhere(value), None, 0)
    with pytest.raises(MisconfigurationException, match="not finite at step 2"):
        stop.on_save_checkpoint(after_step(3), torch.nn.Linear(1, 1), {})
    with pytest.raises(MisconfigurationException, match="not finite at step 2"):
        stop.on_train_batch_end(after_step(4), None, loss_elsewhere(1.0), None, 0)
    with pytest.raises(MisconfigurationException, match="not finite at step 2"):
        stop.on_train_end(after_step(4), None)


def test_a_loss_on_another_device_is_copied_because_its_memory_is_used_again():
    stop = StopOnNonFiniteLoss(every_n_steps=4)
    outputs = loss_elsewhere(1.0)
    stop.on_train_batch_end(after_step(1), None, outputs, None, 0)
    outputs["loss"].fill_(float("nan"))
    stop.on_train_end(after_step(1), None)


def test_the_losses_of_micro_batches_are_read_at_the_end_of_their_step():
    stop = StopOnNonFiniteLoss(every_n_steps=2)
    values = {9: float("nan")}  # four batches a step: the first of step 3
    for batch in range(1, 16):
        trainer = after_step(batch // 4, accumulates=batch % 4 != 0)
        stop.on_train_batch_end(trainer, None, loss_elsewhere(values.get(batch, 1.0)), None, 0)
    assert len(stop._losses) == 7  # those since step 2
    with pytest.raises(MisconfigurationException, match="not finite at step 3"):
        stop.on_train_batch_end(after_step(4), None, loss_elsewhere(1.0), None, 0)


def test_the_states_of_optimisers_take_no_memory_where_only_the_model_is_needed(monkeypatch, tmp_path):
    n = 4 * 2**20  # 16 MiB a tensor
    states = [{"state": {0: {"exp_avg": torch.ones(n), "exp_avg_sq": torch.ones(n)}}}]
    file = tmp_path / "large.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(8)}, "optimizer_states": states}, file)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def load(*args, **options):
        before, loaded = resident(), torch_load(*args, **options)
        assert resident() - before < n
        return loaded

    torch_load = torch.load
    monkeypatch.setattr(torch, "load", load)
    checkpoint = AtomicCheckpointIO().load_model(file)
    assert checkpoint.keys() == {"state_dict"}
    assert checkpoint["state_dict"]["w"].sum() == 8


def test_a_compressed_checkpoint_is_refused(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(1000)}}, tmp_path / "whole.ckpt")
    with ZipFile(tmp_path / "whole.ckpt") as whole, ZipFile(tmp_path / "packed.ckpt", "w", ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    with pytest.raises(MisconfigurationException, match="damaged"):
        AtomicCheckpointIO().load_model(tmp_path / "packed.ckpt")
