"""A run that was killed and resumed ends with the weights and metrics of an uninterrupted one, bit for bit."""

import os
import shutil
import signal

import forks
import pytest
from helpers import BEST, LAST, RUNS, assert_same_weights, metrics_that_repeat

from experiments.run_folder import numbered
from lightning_modules.runtime import checkpoint_io

# settings, step of the kill, step of the checkpoint
SETTINGS = {
    "mid_epoch": ({}, 13, 8),
    "several_epochs": ({"data__init_args__batch_size": 64, "trainer__val_check_interval": 5}, 17, 15),
    "validation_at_epoch_ends": (
        {
            "data__init_args__batch_size": 64,
            "trainer__val_check_interval": 1.0,
            "trainer__check_val_every_n_epoch": 1,
        },
        13,
        9,
    ),
    "accumulation": ({"trainer__accumulate_grad_batches": 3, "trainer__val_check_interval": 12}, 13, 12),
    "random_windows_and_workers": (
        {"data__init_args__windows": "random", "data__init_args__num_workers": 1},
        13,
        8,
    ),
}


def saved_step(run: str) -> int:
    return checkpoint_io.AtomicCheckpointIO().load_checkpoint(RUNS / run / LAST)["global_step"]


@pytest.mark.parametrize(("settings", "killed_at", "saved_at"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_killed_run_resumes_to_the_same_weights_and_metrics(
    llm_train, forked, tiny, whole, settings, killed_at, saved_at
):
    config = tiny(**settings)
    command = ("fit", "-c", config, "--run.name", "killed")
    assert forked(*command, prepare=lambda: forks.signal_after_step(killed_at)) == -signal.SIGKILL
    assert saved_step("killed") == saved_at
    resumed = llm_train(*command, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(whole(**settings) / LAST, RUNS / "killed" / LAST)
    rows = metrics_that_repeat(RUNS / "killed")
    assert rows == metrics_that_repeat(whole(**settings))
    assert {"4", "8", "12", "16", "20", "24"} <= {row[0] for row in rows}
    assert numbered(RUNS, "killed") == [RUNS / "killed"]


@pytest.mark.parametrize("nth_write", [3, 4])  # the validation at step 16: its best.ckpt, or its last.ckpt
def test_a_kill_while_a_checkpoint_is_written_leaves_the_earlier_one(llm_train, forked, tiny, whole, nth_write):
    def die_in_mid_write() -> None:
        writes = []
        save = checkpoint_io.torch.save

        def half_save(checkpoint: dict, file: object) -> None:
            writes.append(1)
            if len(writes) == nth_write:
                file.write(b"PK half a checkpoint")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(checkpoint, file)

        checkpoint_io.torch.save = half_save

    command = ("fit", "-c", tiny(), "--run.name", "killed")
    assert forked(*command, prepare=die_in_mid_write) == -signal.SIGKILL
    assert list((RUNS / "killed/checkpoints").glob(".*.ckpt.*"))  # the incomplete file, under a temporary name
    assert llm_train(*command, "--ckpt_path", "last").code == 0
    assert_same_weights(whole() / LAST, RUNS / "killed" / LAST)


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_the_run_resumes_from_it(llm_train, forked, tiny, whole, signal_number, code):
    command = ("fit", "-c", tiny(), "--run.name", "stopped")
    assert forked(*command, prepare=lambda: forks.signal_after_step(12, signal_number)) == code
    assert '"status": "stopped"' in (RUNS / "stopped/summary.json").read_text()
    assert saved_step("stopped") in (12, 13)  # of the step in progress, not of the validation at step 8
    assert llm_train(*command, "--ckpt_path", "last").code == 0
    assert_same_weights(whole() / LAST, RUNS / "stopped" / LAST)


def test_a_fit_from_another_checkpoint_than_the_last_gets_a_folder_of_its_own(llm_train, tiny, whole):
    shutil.copytree(whole(), RUNS / "tiny")
    before = (RUNS / "tiny" / LAST).read_bytes()
    branch = ("fit", "-c", tiny(), "--ckpt_path", RUNS / "tiny" / BEST, "--trainer.max_steps", "28")
    assert llm_train(*branch).code == 0
    assert (RUNS / "tiny.2" / LAST).is_file()
    assert (RUNS / "tiny" / LAST).read_bytes() == before


def test_the_saved_configuration_repeats_the_run(llm_train, whole):
    assert llm_train("fit", "-c", whole() / "config.yaml").code == 0
    assert_same_weights(whole() / LAST, RUNS / "whole" / LAST)
