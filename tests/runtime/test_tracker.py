"""Weights & Biases that cannot start: one line, and the run goes on."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import wandb
from helpers import RUNS

from experiments.cli import ExperimentCLI
from experiments.run.run_folder import claim
from lightning_modules.runtime import loggers
from lightning_modules.runtime.loggers import WandbRecorder
from lightning_modules.runtime.private_names import wandb_service

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


@pytest.mark.slow
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


def test_runs_of_one_process_in_two_working_folders_have_their_records(tracker, tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name / "run").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        logger = attached(Path("run"))
        logger.log_metrics({"loss": 1.0}, 0)
        logger.finish(0)
    wandb.teardown()  # it writes until then
    assert len(list(tmp_path.glob("*/run/wandb/offline-run-*/*.wandb"))) == 2


def test_many_offline_runs_are_uploaded_by_a_pattern(tracker, tmp_path):
    run = tmp_path / "a name"
    logger = attached(run)
    logger.settings["mode"] = "offline"
    assert logger.sync_command is None
    commands = []
    for number in range(3):
        (run / f"wandb/offline-run-{number}").mkdir(parents=True)
        commands.append(logger.sync_command)
    one, two = (f"'{run}/wandb/offline-run-{number}'" for number in range(2))
    assert commands == [f"wandb sync {one}", f"wandb sync {one} {two}", f"wandb sync '{run}'/wandb/offline-run-*"]


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
    assert line == (
        f"W&B: the upload has not ended in time; `wandb sync {os.path.relpath(folder)}` uploads the rest of the history"
    )


@pytest.mark.parametrize("how", ["limit", "log_model", "signal"])
def test_the_process_of_wandb_is_ended_if_it_ignores_the_limit(tracker, tmp_path, monkeypatch, capfd, how):
    monkeypatch.setattr(loggers, "_LONGEST_UPLOAD", "0.001")
    monkeypatch.setattr(loggers, "_GRACE", 0.001)
    answers = [True, False]
    monkeypatch.setattr(loggers, "_answers", lambda address: answers.pop(0))
    logger = WandbRecorder(log_model=how == "log_model")
    logger.attach(tmp_path, "topic", "name", "fit")
    run, service = logger.experiment, wandb_service()
    service.send_signal(signal.SIGSTOP)  # it answers no request, as if it repeated one of its own
    if how == "signal":
        end = run.finish
        monkeypatch.setattr(run, "finish", lambda exit_code: sys.exit(143))
        with pytest.raises(SystemExit):
            logger.finish(1)
        monkeypatch.setattr(run, "finish", end)
    else:
        logger.finish(1)
    assert service.wait(10) == -signal.SIGKILL
    assert answers == ([] if how == "log_model" else [True, False])
    (line,) = capfd.readouterr().err.splitlines()
    assert "the upload has not ended in time" in line
    if how == "signal":
        logger.run = run
        logger.finish(1)
    assert wandb.run is wandb_service() is None  # another run can begin


def test_a_run_whose_record_has_failed_is_ended(tracker, tmp_path, monkeypatch, capfd):
    logger = attached(tmp_path)
    run, service, codes = logger.experiment, wandb_service(), []
    end = run.finish
    monkeypatch.setattr(run, "finish", lambda exit_code: codes.append(exit_code) or end(exit_code))
    with logger.tolerated():
        raise ValueError("no such metric")
    cli = ExperimentCLI.__new__(ExperimentCLI)
    cli.run, cli.trainer = None, SimpleNamespace(loggers=[logger])
    cli.close()
    assert codes == [1]
    assert service.poll() == 0
    assert wandb.run is None
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "W&B failed (ValueError: no such metric): the run goes on without it"


def test_a_server_that_does_not_answer_costs_seconds(monkeypatch):
    assert not loggers._answers("http://127.0.0.1:9")

    def head(address: str, timeout: float) -> None:
        assert 0 < timeout <= 5
        raise requests.Timeout

    monkeypatch.setattr(requests, "head", head)
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
