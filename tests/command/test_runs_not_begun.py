"""A run that is refused before its first batch leaves no folder: the next try has its name."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers import LAST, RUNS, TINY

from datamodules import token_cache

WRITES = """
import lightning as L

class Writes(L.Callback):
    def setup(self, trainer, module, stage):
        open(trainer.default_root_dir + "/notes.txt", "w").close()
"""

UNTRACKED = """
from lightning_modules.{topic} import PretrainModule

class Untracked(PretrainModule):
    def track(self, metrics):
        pass
"""

ASKS = """
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from datamodules.{topic} import PretrainDataModule

class Asks(PretrainDataModule):
    def predict_dataloader(self):
        raise MisconfigurationException("there is no text to predict")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer.lr=-1"], "Invalid learning rate: -1"),  # refused when W&B and the configuration are written
        (["--data.block_size=50000"], "fewer than a block"),
    ],
)
def test_a_run_that_is_refused_before_its_first_batch_leaves_no_folder(llm_train, tiny, monkeypatch, flags, said):
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = llm_train("fit", "-c", tiny(), *flags)
    assert (done.code, said in done.err, "failed at step" in done.err) == (1, True, False), done.err
    assert not (RUNS / "tiny").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_stopped_while_its_data_is_prepared_leaves_no_folder(forked, tiny, number):
    def signal_in_preparation() -> None:
        token_cache._write_documents = lambda *_: signal.raise_signal(number)

    assert forked("fit", "-c", tiny(), prepare=signal_in_preparation) == 128 + signal.SIGTERM
    assert not list(RUNS.iterdir())


def test_a_run_of_a_study_that_is_refused_stays_with_its_reason(llm_train, tiny):
    assert llm_train("fit", "-c", tiny(), "--optimizer.lr=-1", "--run.study=lr").code == 1
    assert "Invalid learning rate" in (RUNS / "lr/tiny/summary.json").read_text()


def test_the_folder_of_a_refused_run_stays_with_a_file_that_is_not_of_the_command(llm_train, tiny):
    Path("mine.py").write_text(WRITES)
    done = llm_train("fit", "-c", tiny(), "--optimizer.lr=-1", "--trainer.callbacks+=mine.Writes")
    assert (done.code, (RUNS / "tiny/notes.txt").is_file()) == (1, True), done.err


def test_an_evaluation_that_ends_without_a_batch_leaves_its_record(llm_train, tiny):
    done = llm_train("validate", "-c", tiny(trainer__limit_val_batches=0))
    assert done.code == 0, done.err
    assert (RUNS / "tiny/summary_validate.json").is_file()


@pytest.mark.parametrize(("flags", "code"), [([], 1), (["--trainer.limit_val_batches=0"], 0)])
def test_a_module_without_a_metric_is_refused_before_its_first_batch_if_the_run_validates(llm_train, tiny, flags, code):
    Path("mine.py").write_text(UNTRACKED.format(topic=TINY.parent.name))
    done = llm_train("fit", "-c", tiny(trainer__max_steps=1), "--model=mine.Untracked", *flags)
    assert (done.code, "Untracked: the run validates, and" in done.err) == (code, bool(code)), done.err
    assert Path("runs/mine/tiny").exists() != bool(code)


def test_a_prediction_that_is_refused_leaves_no_folder(llm_train, tiny, whole):
    Path("mine.py").write_text(ASKS.format(topic=TINY.parent.name))
    shutil.copy(whole() / LAST, "weights.ckpt")
    done = llm_train("predict", "-c", tiny(), "--data=mine.Asks", "--ckpt_path=weights.ckpt")
    assert (done.code, done.err.splitlines()[-1]) == (1, "error: there is no text to predict"), done.err
    assert not (RUNS / "tiny").exists()


@pytest.mark.slow
def test_commands_in_forked_processes_keep_their_records(llm_train, tiny):
    forked = ("--trainer.strategy=ddp_fork", "--trainer.devices=2")
    for command, record in (("fit", "summary.json"), ("validate", "summary_validate.json")):
        done = llm_train(command, "-c", tiny(), f"--run.name={command}", *forked)
        assert done.code == 0, done.err
        assert json.loads((RUNS / command / record).read_text())["status"] == "finished"


def test_a_recorded_run_with_a_number_that_is_refused_now_is_evaluated(llm_train, whole):
    run = shutil.copytree(whole(), RUNS / "whole")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("gradient_clip_val: null", "gradient_clip_val: -1"))
    assert (run / "config.yaml").read_text() != config
    done = llm_train("validate", "-c", run / "config.yaml", "--ckpt_path=last")
    assert done.code == 0, done.err
