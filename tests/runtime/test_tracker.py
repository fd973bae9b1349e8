"""Weights & Biases that cannot start: one line, and the run goes on."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from helpers import RUNS

from experiments.cli import ExperimentCLI
from experiments.run.run_folder import claim
from lightning_modules.runtime import loggers
from lightning_modules.runtime.loggers import WandbRecorder

KEY = "0123456789" * 4


@pytest.fixture
def tracker(monkeypatch, tmp_path):
    """Set up Weights & Biases without an account, and without the settings of earlier tests."""
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    for name in ("WANDB_FINISH_TIMEOUT", "WANDB_FINISH_TIMEOUT_RAISES"):  # which a run sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    wandb.teardown()


def attached(folder: Path) -> WandbRecorder:
    logger = WandbRecorder()
    logger.attach(folder, "topic", "name", "fit")
    return logger


@pytest.mark.parametrize(
    ("environment", "mode", "said"),
    [
        ({"WANDB_API_KEY": ""}, "offline", ""),
        ({"WANDB_API_KEY": KEY}, "offline", "api.wandb.ai does not answer: the record of the run is kept offline"),
        ({"WANDB_MODE": " DISABLED "}, "disabled", ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mode_that_cannot_work_becomes_one_that_can(tracker, tmp_path, monkeypatch, capfd, environment, mode, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loggers, "_answers", lambda address: False)
    logger = attached(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    assert logger.settings["mode"] == mode
    assert logger.experiment.disabled == (mode == "disabled")
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == (mode == "offline")
    logger.finish(0)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(said)
    assert said in "".join(lines)


def test_a_run_that_fails_before_it_is_recorded_leaves_no_files_of_the_tracker(tracker, tmp_path):
    cli = ExperimentCLI.__new__(ExperimentCLI)
    cli.run = claim(tmp_path, "topic", "name")
    cli.config, cli.subcommand = {"fit": {"trainer": {}}}, "fit"
    logger = attached(cli.run.path)
    cli.trainer = SimpleNamespace(loggers=[logger])
    assert not logger.experiment.disabled
    cli.close()
    wandb.teardown()
    assert list(cli.run.path.parent.iterdir()) == []


@pytest.mark.parametrize("variable", ["WANDB_BASE_URL=nonsense", f"WANDB_RUN_ID={'x' * 300}/"])
def test_a_run_whose_tracker_cannot_start_is_trained_and_recorded(llm_train, tracker, tiny, monkeypatch, variable):
    monkeypatch.setenv(*variable.split("=", 1))
    done = llm_train("fit", "-c", tiny(trainer__max_steps=4))
    assert done.code == 0, done.err
    (line,) = (line for line in done.err.splitlines() if line.startswith("W&B"))
    assert line.endswith("the run goes on without it")
    assert (RUNS / "tiny/config.yaml").is_file()
    assert (RUNS / "tiny/summary.json").is_file()


@pytest.mark.parametrize(
    ("given", "log_model", "seconds"), [({}, False, 120), ({}, True, 0), ({"WANDB_FINISH_TIMEOUT": "7"}, False, 7)]
)
def test_the_upload_at_the_end_of_a_run_has_a_limit(tracker, tmp_path, monkeypatch, capfd, given, log_model, seconds):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    logger = WandbRecorder(log_model=log_model)
    logger.attach(tmp_path, "topic", "name", "fit")
    run = logger.experiment
    if "finish_timeout" in type(run.settings).model_fields:  # newer versions of wandb
        assert run.settings.finish_timeout == seconds
        assert run.settings.finish_timeout_raises
    end = run.finish

    def end_late(exit_code: int) -> None:
        end(exit_code)
        raise TimeoutError("Timed out finishing run.")

    monkeypatch.setattr(run, "finish", end_late)
    logger.finish(1)
    (line,) = capfd.readouterr().err.splitlines()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert line == f"W&B: the upload has not ended in time; `wandb sync {os.path.relpath(folder)}` uploads the rest"


def test_a_server_that_does_not_answer_costs_seconds():
    assert not loggers._answers("http://127.0.0.1:9")


@pytest.mark.parametrize("mark", ["wandb/id.json", None])
def test_settings_of_wandb_in_a_run_folder_are_not_read(tracker, tmp_path, monkeypatch, mark):
    run = tmp_path / "run"
    (run / "wandb").mkdir(parents=True)
    (run / "wandb/settings").write_text("[default]\nproject = strangers\n")
    if mark:
        (run / mark).write_text("{}")
    monkeypatch.chdir(run)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = attached(tmp_path / "new")
    assert not logger.experiment.disabled
    assert wandb.setup().settings.project == (None if mark else "strangers")
    assert Path.cwd() == run
    assert os.environ["WANDB_MODE"] == "offline"
    logger.finish(0)
