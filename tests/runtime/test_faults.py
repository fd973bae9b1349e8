"""What happens on many processes and over many hours: a process dies, a disk is full, W&B fails."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from helpers import assert_close_weights, assert_same_weights, metrics_that_repeat
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.bert_imdb.cached_features import CachedFeatures
from lightning_modules.decoder_pretrain.signal_propagation import SignalPropagation
from lightning_modules.finetuning.freeze import GradualUnfreezing, Stage
from lightning_modules.runtime.loggers import MetricsCSV
from lightning_modules.runtime.sharded import FullyShardedStrategy

ROOT = Path(__file__).parents[2]
RUNS = Path("runs/decoder_pretrain")
LAST = "checkpoints/last.ckpt"
PRESET = ROOT / "experiments/trainer"


def test_a_checkpoint_of_any_layout_goes_on_in_any_other_and_exports_the_same(llm_train, tiny):
    export = {"class_path": "lightning_modules.runtime.export.ExportModel"}
    samples = {  # by the first process alone, which may not leave the others behind
        "class_path": "lightning_modules.runtime.samples.SampleText",
        "init_args": {"prompts": ["ae"], "max_new_tokens": 8},
    }
    config = tiny(trainer__max_steps=12, trainer__val_check_interval=4, trainer__gradient_clip_val=0.5,
                  trainer__num_sanity_val_steps=1, model__init_args__dropout=0.0,
                  **{"trainer__callbacks+": [export, samples]})  # fmt: skip
    assert llm_train("fit", "-c", config, "--run.name", "whole").code == 0
    fit = ("fit", "-c", config, "--run.name")
    forks.wait([forks.start(*fit, "one", prepare=lambda: forks.die_after_step(8))])
    forks.wait(forks.start_ranks(2, *fit, "sharded", *forks.SHARDED, prepare=lambda _: forks.die_after_step(8)))
    assert [torch.load(RUNS / name / LAST, weights_only=True)["global_step"] for name in ("one", "sharded")] == [8, 8]
    for name, layout in {
        "one_to_two": forks.TWO_PROCESSES,
        "one_to_sharded": forks.SHARDED,
        "sharded_to_one": (),
    }.items():
        shutil.copytree(RUNS / name.split("_")[0], RUNS / name)
        command = (*fit, name, *layout, "--auto_resume")
        codes = forks.wait(forks.start_ranks(2, *command) if layout else [forks.start(*command)])
        assert not any(codes), name
        for file in (LAST, "model/model.safetensors"):
            assert_close_weights(RUNS / name / file, RUNS / "whole" / file)


def test_activation_checkpointing_changes_nothing_but_the_memory(tiny):
    config = tiny(trainer__max_steps=4, trainer__val_check_interval=4)  # with dropout
    for name, again in (("kept", "false"), ("again", "true")):
        flags = ("--run.name", name, "--trainer.strategy.activation_checkpointing", again)
        assert forks.wait(forks.start_ranks(2, "fit", "-c", config, *forks.SHARDED, *flags)) == [0, 0]
    assert_same_weights(RUNS / "kept" / LAST, RUNS / "again" / LAST)


@pytest.mark.parametrize(
    "look",
    [
        lambda trainer: SignalPropagation([0]).setup(trainer, None, "fit"),
        lambda trainer: CachedFeatures().on_fit_start(trainer, None),
        lambda trainer: GradualUnfreezing([Stage(layers=0, epoch=1)]).setup(trainer, None, "fit"),
    ],
    ids=["SignalPropagation", "CachedFeatures", "GradualUnfreezing"],
)
def test_what_needs_whole_weights_says_so_where_they_are_shared_out(look):
    with pytest.raises(MisconfigurationException, match=r"needs whole weights.*ddp\.yaml in place of fsdp\.yaml"):
        look(SimpleNamespace(strategy=FullyShardedStrategy()))


def test_a_killed_process_ends_the_job_with_one_line_and_it_goes_on_from_the_last_checkpoint(llm_train, tiny):
    config = tiny(model__init_args__dropout=0.0)
    llm_train("fit", "-c", config, "--run.name", "whole")
    command = ("fit", "-c", config, *forks.TWO_PROCESSES, "--run.name", "named", "--auto_resume")
    output = Path("output.txt")

    def rank_1_dies(rank: int) -> None:
        if rank == 1:
            forks.die_after_step(8)

    ranks = forks.start_ranks(2, *command, prepare=rank_1_dies, output=output)
    ranks[1].join(120)
    died = time.monotonic()
    assert forks.wait(ranks, 60) == [1, -signal.SIGKILL]
    assert time.monotonic() - died < 60
    said = output.read_text()
    assert "error: another process of this job ended" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert forks.wait(forks.start_ranks(2, *command)) == [0, 0]
    assert_close_weights(RUNS / "named" / LAST, RUNS / "whole" / LAST)


@pytest.mark.parametrize(("code", "requeued"), [(143, True), (0, False), (1, False)])
def test_the_batch_file_asks_for_another_turn_when_the_time_is_up(tmp_path, code, requeued):
    for name, script in {"srun": f'echo "$@" > srun.txt; exit {code}', "scontrol": 'echo "$@" > scontrol.txt'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_NNODES": "3"}
    done = subprocess.run(["bash", PRESET / "slurm.sbatch", "-c", "x.yaml"], env=environment, check=False)
    assert done.returncode == code
    assert Path("srun.txt").read_text() == "llm-train fit -c x.yaml --trainer.num_nodes 3 --auto_resume\n"
    assert Path("scontrol.txt").exists() == requeued
    if requeued:
        assert Path("scontrol.txt").read_text() == "requeue 17\n"


def test_no_row_of_metrics_is_lost_with_a_process_that_dies_right_after_a_checkpoint(llm_train, forked, tiny):
    config = tiny()
    llm_train("fit", "-c", config, "--run.name", "whole")
    command = ("fit", "-c", config, "--run.name", "named")
    assert forked(*command, prepare=lambda: forks.die_after_step(16)) == -signal.SIGKILL
    with (RUNS / "named/metrics.csv").open("a") as file:
        file.write("1")  # a row that was not written out
    assert llm_train(*command, "--auto_resume").code == 0
    assert metrics_that_repeat(RUNS / "named") == metrics_that_repeat(RUNS / "whole")


def test_a_disk_that_is_full_when_metrics_are_written_ends_the_run_with_one_line(llm_train, tiny, monkeypatch):
    config = tiny()
    llm_train("fit", "-c", config, "--run.name", "whole")
    add, calls = MetricsCSV._add, []

    def full(self: MetricsCSV, rows: list) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        add(self, rows)

    monkeypatch.setattr(MetricsCSV, "_add", full)
    failed = llm_train("fit", "-c", config, "--run.name", "named")
    assert failed.code == 1
    assert failed.err.splitlines()[-1].startswith("error: [Errno 28] No space left on device: the metrics could not be")
    assert "metrics.csv" in failed.err.splitlines()[-1]
    assert '"failed"' in (RUNS / "named/summary.json").read_text()
    assert llm_train("fit", "-c", config, "--run.name", "named", "--auto_resume").code == 0
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "named" / LAST)
    assert metrics_that_repeat(RUNS / "named") == metrics_that_repeat(RUNS / "whole")


def test_a_cache_that_cannot_be_written_costs_one_line(llm_train, tiny, monkeypatch):
    Path("occupied").write_text("")
    monkeypatch.setenv("LLM_TRAIN_CACHE", "occupied/cache")
    failed = llm_train("fit", "-c", tiny())
    assert failed.code == 1
    assert "occupied/cache" in failed.err.splitlines()[-1]
    assert "$LLM_TRAIN_CACHE" in failed.err.splitlines()[-1]


def test_a_run_goes_on_without_wandb_when_that_fails(llm_train, tiny, monkeypatch):
    logged = []

    def log_metrics(self: WandbLogger, metrics: dict, step: int | None = None) -> None:
        logged.append(step)
        if len(logged) > 2:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(WandbLogger, "log_metrics", log_metrics)
    done = llm_train("fit", "-c", tiny())
    assert done.code == 0
    assert "W&B failed (ConnectionResetError: Connection lost): the run goes on without it" in done.err.splitlines()
    assert [row[0] for row in metrics_that_repeat(RUNS / "tiny")] == ["step", "4", "8", "12", "16", "20", "24"]
