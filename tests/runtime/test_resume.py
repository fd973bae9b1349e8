"""A run that was killed and resumed ends with the weights of one that was not, bit for bit."""

import os
import signal
from pathlib import Path

import pytest
from helpers import assert_same_weights, kill_when, metrics_that_repeat

from experiments.run_folder import numbered
from lightning_modules.runtime import checkpoint_io

RUNS = Path("runs/decoder_pretrain")
LAST = "checkpoints/last.ckpt"


def rows(run: str) -> int:
    """Rows that a run's metrics have so far."""
    file = RUNS / run / "metrics.csv"
    return len(file.read_text().splitlines()) if file.is_file() else 0


SETTINGS = {
    "mid_epoch": {},
    "several_epochs": {"data__init_args__batch_size": 64, "trainer__val_check_interval": 5},  # 10 batches an epoch
    "validation_at_epoch_ends": {
        "data__init_args__batch_size": 64,
        "trainer__val_check_interval": 1.0,
        "trainer__check_val_every_n_epoch": 1,
    },
    "accumulation": {"trainer__accumulate_grad_batches": 3, "trainer__val_check_interval": 12},
    "random_windows_and_workers": {"data__init_args__windows": "random", "data__init_args__num_workers": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_run_killed_at_any_time_resumes_to_the_same_weights(llm_train, forked, tiny, settings):
    config = tiny(**settings)
    assert llm_train("fit", "-c", config, "--run.name", "whole").code == 0
    status = forked(
        "fit", "-c", config, "--run.name", "killed",
        meanwhile=kill_when(lambda: rows("killed") >= 4 and (RUNS / "killed" / LAST).is_file()),
    )  # fmt: skip
    assert status == -signal.SIGKILL
    resumed = llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "killed" / LAST)
    assert numbered(RUNS, "killed") == [RUNS / "killed"]


def test_the_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one(llm_train, forked, tiny):
    config = tiny()
    llm_train("fit", "-c", config, "--run.name", "whole")
    forked("fit", "-c", config, "--run.name", "killed", meanwhile=kill_when(lambda: rows("killed") >= 5))
    llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last")
    whole, killed = (metrics_that_repeat(RUNS / run) for run in ("whole", "killed"))
    assert [row[0] for row in whole[1:]] == ["4", "8", "12", "16", "20", "24"]
    assert killed == whole


@pytest.mark.parametrize("nth_write", [3, 4])  # the validation at step 16: its best.ckpt, or its last.ckpt
def test_a_kill_while_a_checkpoint_is_written_leaves_the_earlier_one(llm_train, forked, tiny, monkeypatch, nth_write):
    config = tiny()
    llm_train("fit", "-c", config, "--run.name", "whole")

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

    status = forked("fit", "-c", config, "--run.name", "killed", prepare=die_in_mid_write)
    assert status == -signal.SIGKILL
    assert list((RUNS / "killed/checkpoints").glob(".*.ckpt.*"))  # the half-written file, which nobody takes for one
    assert llm_train("fit", "-c", config, "--run.name", "killed", "--ckpt_path", "last").code == 0
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "killed" / LAST)


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_from_there(llm_train, forked, tiny, signal_number, code):
    config = tiny(trainer__max_steps=400, trainer__val_check_interval=100)
    llm_train("fit", "-c", config, "--run.name", "whole")
    status = forked(
        "fit", "-c", config, "--run.name", "stopped",
        meanwhile=kill_when(lambda: rows("stopped") >= 30, signal_number),
    )  # fmt: skip
    assert status == code
    assert '"status": "stopped"' in (RUNS / "stopped/summary.json").read_text()
    saved = checkpoint_io.AtomicCheckpointIO().load_checkpoint(RUNS / "stopped" / LAST)["global_step"]
    assert saved % 100  # saved where it was stopped, not at the last validation
    assert llm_train("fit", "-c", config, "--run.name", "stopped", "--ckpt_path", "last").code == 0
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "stopped" / LAST)


def test_a_finished_run_can_be_made_longer(llm_train, tiny):
    config = tiny()
    llm_train("fit", "-c", config)
    resumed = llm_train("fit", "-c", config, "--ckpt_path", "last", "--trainer.max_steps", "32")
    assert "finished at step 32" in resumed.err


def test_another_checkpoint_than_the_last_starts_a_branch(llm_train, tiny):
    config = tiny()
    llm_train("fit", "-c", config)
    before = (RUNS / "tiny" / LAST).read_bytes()
    llm_train("fit", "-c", config, "--ckpt_path", RUNS / "tiny/checkpoints/best.ckpt", "--trainer.max_steps", "32")
    assert (RUNS / "tiny.2" / LAST).is_file()
    assert (RUNS / "tiny" / LAST).read_bytes() == before


def test_the_saved_configuration_repeats_the_run(llm_train, tiny):
    llm_train("fit", "-c", tiny(), "--optimizer.lr", "0.02")
    assert llm_train("fit", "-c", RUNS / "tiny/config.yaml").code == 0
    assert_same_weights(RUNS / "tiny" / LAST, RUNS / "tiny.2" / LAST)
