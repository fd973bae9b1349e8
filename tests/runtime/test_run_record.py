"""The record of a run, in its folder and in the offline files of Weights & Biases."""

import importlib.metadata
import itertools
import json
import shutil
import signal
import subprocess
from pathlib import Path

import lightning as L
import pytest
import torch
import wandb
import yaml
from helpers import BEST, LAST, RUNS
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from wandb.util import get_core_path

from experiments.comparison.runs import read_folder
from experiments.run import run_record
from experiments.run.run_folder import RunFolder, claim, find, of_checkpoint, runs_named
from lightning_modules.metrics import CorpusLoss
from lightning_modules.runtime.learning_curve import LearningCurve, read_metric
from lightning_modules.runtime.loggers import MetricsCSV, WandbRecorder
from lightning_modules.runtime.throughput import Throughput

RUN, TOPIC = RUNS / "first", RUNS.name


def test_runs_of_one_name_are_numbered_and_the_newest_is_found(tmp_path):
    made = [claim(tmp_path, "topic", "lr").name for _ in range(11)]
    assert made[:3] == ["lr", "lr.2", "lr.3"]
    assert claim(tmp_path, "topic", "lr.3").name == "lr.12"
    claim(tmp_path, "topic", "lr_high")
    assert [path.name for path in runs_named(tmp_path / "topic", "lr")][-2:] == ["lr.11", "lr.12"]
    assert find(tmp_path, "topic", "lr").name == "lr.12"
    assert find(tmp_path, "topic", "lr.2").name == "lr.2"


def test_a_name_that_ends_in_a_dot_and_digits_is_kept(tmp_path):
    names = ["lr0.005", "lr0.05", "lr0.2", "v1.0"]
    assert [claim(tmp_path, "topic", name).name for name in names] == names
    assert [claim(tmp_path, "topic", name).name for name in names] == [f"{name}.2" for name in names]
    assert claim(tmp_path, "topic", "lr0").name == "lr0"
    assert find(tmp_path, "topic", "lr0.05").name == "lr0.05.2"
    assert runs_named(tmp_path / "topic", "v1") == []


def test_a_link_to_nothing_is_a_name_that_is_taken_and_no_folder_of_runs(tmp_path):
    (tmp_path / "topic").mkdir()
    (tmp_path / "topic/name").symlink_to("lost")
    assert claim(tmp_path, "topic", "name").name == "name.2"
    (tmp_path / "runs").symlink_to("lost")
    with pytest.raises(MisconfigurationException, match=r"runs is a link to lost, which does not exist; create that"):
        claim(tmp_path / "runs", "topic", "name")


def test_a_checkpoint_belongs_to_the_run_that_it_lies_in(tmp_path):
    checkpoint = tmp_path / "topic/name/checkpoints/last.ckpt"
    assert of_checkpoint(checkpoint) is None
    checkpoint.parent.mkdir(parents=True)
    (tmp_path / "topic/name/config.yaml").touch()
    assert of_checkpoint(checkpoint) == RunFolder(tmp_path / "topic/name", "topic", is_new=False)
    (tmp_path / "topic/name/config.yaml").write_text("run: {topic: other, study: name}")
    assert of_checkpoint(checkpoint) == RunFolder(tmp_path / "topic/name", "other", is_new=False, study="name")


def test_arms_of_a_study_whose_names_end_in_numbers_are_told_apart(tmp_path):
    for name in ("dropout=0", "dropout=0.2", "dropout=0", "dropout=0.2", "dropout=0+2"):
        claim(tmp_path, "topic", name, "study")
    arms = {"dropout=0", "dropout=0+2", "dropout=0+3", "dropout=0.2", "dropout=0.2+2"}
    assert {path.name for path in (tmp_path / "topic/study").iterdir()} == arms
    for name in arms:
        assert find(tmp_path, "topic", name, "study").name == name


def test_the_command_of_a_run_is_that_of_main_in_a_script_too(whole):
    (session,) = json.loads((whole() / "environment.json").read_text())
    assert session["command"].startswith("llm-train fit -c ")  # and not the words of pytest
    assert f"\n    {session['command'].split(' -c ')[0]} -c " in (whole() / "model/README.md").read_text()


def test_the_commit_is_that_of_this_project_and_not_of_a_folder_around_an_installed_package(tmp_path, monkeypatch):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run((*git, "init", "-q"), check=True)
    subprocess.run((*git, "commit", "-q", "--allow-empty", "-m", "first"), check=True)
    made = subprocess.check_output((*git, "rev-parse", "--short=12", "HEAD"), text=True).strip()
    for package, commit in ((tmp_path / "experiments", made), (tmp_path / ".venv/site-packages/experiments", None)):
        package.mkdir(parents=True)
        monkeypatch.setattr(run_record.names, "SHIPPED", package)
        record = run_record.environment(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))
        assert record["commit"] == commit
    assert record["packages"]["llm-train"] == importlib.metadata.version("llm-train")


def test_metrics_of_one_step_share_a_row_and_new_metrics_get_a_column(tmp_path):
    logger = MetricsCSV()
    logger.attach(tmp_path, "topic", "name", "fit")
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, step=9)
    logger.save()
    logger.log_metrics({"val/loss": 1.5, "epoch": 0}, step=9)
    logger.log_metrics({"train/loss": 1.0, "epoch": 1}, step=19)
    logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,train/loss,val/loss",
        "10,0,2.0,1.5",
        "20,1,1.0,",
    ]


def test_a_later_metric_rewrites_the_header_and_a_resumed_run_drops_what_it_repeats(tmp_path):
    first = MetricsCSV()
    first.attach(tmp_path, "topic", "name", "fit")
    for step in (9, 19, 29):
        first.log_metrics({"train/loss": step}, step=step)
    first.flush()
    second = MetricsCSV()
    second.attach(tmp_path, "topic", "name", "fit")
    second.go_on_from(20, [])
    second.log_metrics({"train/loss": 5.0, "val/loss": 6.0}, step=29)
    second.flush()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,train/loss,val/loss",
        "10,0,9.0,",
        "20,0,19.0,",
        "30,0,5.0,6.0",
    ]
    # A run that ends with the checkpoint of step 10 has no later rows, and keeps what was logged after the checkpoint.
    second.restore(10, [{"step": 10, "epoch": 0, "train/loss": 1.0}, {"step": 5, "epoch": 0, "train/loss": 2.0}])
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == ["5,0,2.0,", "10,0,9.0,"]


EXPORT = {"class_path": "lightning_modules.runtime.export.ExportModel"}


@pytest.fixture
def offline_wandb(monkeypatch, tmp_path):
    """Set up Weights & Biases as on a machine where no user is logged in."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    yield
    wandb.teardown()  # it has cached the environment


def read_back(folder: Path) -> dict[str, list[dict]]:
    """Return the records of an offline run by kind, from W&B's own reader."""
    wandb.teardown()  # its service may still be writing
    (file,) = folder.glob("*.wandb")
    command = [
        get_core_path(),
        "leet",
        "inspect",
        "--no-observability",
        "--json",
        "--run-file",
        str(file),
        str(folder.parent),
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records: dict[str, list[dict]] = {}
    for record in map(json.loads, lines):
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def summary(records: dict[str, list[dict]]) -> dict[str, object]:
    return {name: value for update in records["summary"] for name, value in update["update"].items()}


def artifacts(records: dict[str, list[dict]]) -> dict[str, dict]:
    return {artifact["name"]: artifact for artifact in records.get("artifact", [])}


def session(folder: Path) -> dict[str, list[dict]]:
    """Return the records of the only session of a run."""
    (found,) = folder.glob("wandb/offline-run-*")
    return read_back(found)


@pytest.fixture
def first(llm_train, tiny, offline_wandb, monkeypatch, tmp_path_factory) -> Path:
    """Write the YAML of a run, and copy the run, whose validation loss is 1 at step 8 and 2 at step 16.

    The run is made once in a test session.
    """
    samples = {
        "class_path": "lightning_modules.runtime.samples.SampleText",
        "init_args": {"prompts": ["a"], "max_new_tokens": 4},
    }
    loggers = [
        {"class_path": "lightning_modules.runtime.loggers.MetricsCSV"},
        {"class_path": "lightning_modules.runtime.loggers.WandbRecorder", "init_args": {"log_model": True}},
    ]
    config = tiny("first", **{"trainer__callbacks+": [EXPORT, samples], "trainer__logger": loggers})
    made = tmp_path_factory.getbasetemp() / "offline_wandb"
    if not made.exists():
        losses = itertools.count(1)

        def compute(self: CorpusLoss) -> dict[str, torch.Tensor]:
            loss = torch.tensor(float(next(losses)) if self.update_called else 0.0)
            return {"loss": loss, "bits_per_byte": loss / 2}

        with monkeypatch.context() as patch:
            patch.setattr(CorpusLoss, "compute", compute)
            done = llm_train("fit", "-c", config, "--trainer.max_steps", "16")
        assert done.code == 0, done.err
        (RUN / "said.txt").write_text(done.err)
        wandb.teardown()  # its service may still be writing
        shutil.move(RUN, made)
    shutil.copytree(made, RUN)
    return config


@pytest.mark.slow
def test_the_offline_files_hold_the_run(first):
    (folder,) = RUN.glob("wandb/offline-run-*")
    assert f"wandb   wandb sync {folder}\n" in (RUN / "said.txt").read_text()
    records = read_back(folder)
    run = records["run"][0]
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("first", TOPIC, "fit")
    assert run["tags"] == [TOPIC]
    logged = records["config"][0]["update"]
    saved = yaml.safe_load((RUN / "config.yaml").read_text())
    assert logged["model"]["init_args"]["n_embd"] == 16
    assert logged.keys() == saved.keys()
    history = [item["item"] for item in records["history"]]
    losses = {item["trainer/global_step"]: item["train/loss"] for item in history if "train/loss" in item}
    assert losses == dict(zip(*read_metric(RUN / "metrics.csv", "train/loss"), strict=True))
    assert list(folder.glob("files/media/images/figures/learning_curve*.png"))
    assert list(folder.glob("files/media/table/samples*.table.json"))

    # The best validation, which is the first, and not the last.
    assert read_metric(RUN / "metrics.csv", "val/loss") == ([8, 16], [1.0, 2.0])
    shown = summary(records)
    assert (shown["val/loss"], shown["best/val/loss"], shown["best/step"]) == (1.0, 1.0, 8)
    assert shown["val/bits_per_byte"] == 0.5

    made = artifacts(records)
    del made[f"run-{run['run_id']}-samples"]  # the table of the samples
    assert set(made) == {f"{kind}-{run['run_id']}" for kind in ("config", "tokenizer", "model")}
    assert not any(artifact.get("use_after_commit") for artifact in made.values())


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_wandb_run(llm_train, first):
    resumed = llm_train("fit", "-c", first, "--ckpt_path", "last")
    assert "finished at step 24" in resumed.err
    run_id = json.loads((RUN / "wandb/id.json").read_text())["id"]
    sessions = sorted(RUN.glob("wandb/offline-run-*"))
    assert all(str(folder) in resumed.err for folder in sessions)
    again = llm_train("fit", "-c", first, "--ckpt_path", "last")
    assert again.err.splitlines()[-1] == f"{RUN} is finished: nothing is left to do"
    records = [read_back(folder) for folder in sorted(RUN.glob("wandb/offline-run-*"))]
    assert [session["run"][0]["run_id"] for session in records] == [run_id] * 3
    # A run that was finished before is no failed one in W&B.
    assert [session["exit"][0].get("exit_code", 0) for session in records] == [0] * 3


@pytest.mark.slow
def test_runs_that_read_files_of_other_runs_are_joined_by_artifacts(llm_train, tiny, first):
    run_id = json.loads((RUN / "wandb/id.json").read_text())["id"]
    made = artifacts(session(RUN))
    second = tiny("second", trainer__max_steps=8, data__init_args__tokenizer=str(RUN / "tokenizer"))
    assert llm_train("fit", "-c", second).code == 0
    taken = artifacts(session(RUNS / "second"))
    used = {name: artifact for name, artifact in taken.items() if artifact.get("use_after_commit")}
    assert used.keys() == {f"tokenizer-{run_id}"}
    assert used[f"tokenizer-{run_id}"]["digest"] == made[f"tokenizer-{run_id}"]["digest"]
    assert not any(name.startswith("model") for name in taken)  # log_model is false by default

    branch = ("fit", "-c", second, "--run.name", "third", "--trainer.max_steps", "12", "--ckpt_path")
    assert llm_train(*branch, RUNS / "second" / BEST).code == 0
    other_id = json.loads((RUNS / "second/wandb/id.json").read_text())["id"]
    # The checkpoint of the second run was not logged, so its configuration stands for the run.
    taken = artifacts(session(RUNS / "third"))
    used = {name for name, artifact in taken.items() if artifact.get("use_after_commit")}
    assert used == {f"tokenizer-{run_id}", f"config-{other_id}"}


@pytest.mark.slow
def test_a_run_of_wandbs_agent_is_named_after_its_settings_and_grouped_by_its_study(
    llm_train, tiny, offline_wandb, monkeypatch, tmp_path
):
    given = tmp_path / "config-abc.yaml"
    given.write_text("wandb_version: 1\noptimizer.lr:\n  value: 0.02\nseed_everything:\n  value: 7\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(given))
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    # The agent writes null as Python does.
    settings = ("--optimizer.lr=0.02", "--seed_everything=7", "--data.cache_dir=None", "--trainer={'max_time': None}")
    command = ("fit", "-c", tiny(trainer__max_steps=4), *settings)
    assert llm_train(*command, "--run.study=rates").code == 0
    run = session(RUNS / "rates/lr=0.02,seed=7")["run"][0]
    assert (run["run_id"], run["run_group"], run["display_name"]) == ("abc", "rates", "lr=0.02,seed=7")
    assert run["tags"] == [TOPIC, "rates"]

    monkeypatch.setenv("WANDB_MODE", "disabled")
    for study, folder in (("rates", "rates/lr=0.02,seed=7+2"), (None, "sweep1/lr=0.02,seed=7")):
        assert llm_train(*command, *([f"--run.study={study}"] if study else [])).code == 0
        recorded = yaml.safe_load((RUNS / folder / "config.yaml").read_text())["run"]
        assert recorded["study"] == (study or "sweep1")
    assert not Path("None").exists()


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "x"}, "", "online"),
        ({"WANDB_API_KEY": ""}, "", "offline"),
        ({"WANDB_MODE": "Offline"}, "", "offline"),
        ({"WANDB_MODE": "ofline", "WANDB_API_KEY": "x"}, "", "offline"),
        ({"WANDB_MODE": "shared"}, "", "shared"),
        ({}, "machine api.wandb.ai login user password key\n", "online"),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password key\n", "offline"),
    ],
)
def test_wandb_is_online_only_if_a_user_is_logged_in(monkeypatch, tmp_path, offline_wandb, environment, netrc, mode):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.netrc").write_text(netrc)
    (tmp_path / "home/.netrc").chmod(0o600)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logger = WandbRecorder()
    logger.attach(tmp_path, "topic", "name", "fit")
    assert logger.settings["mode"] == mode


def test_a_run_whose_text_has_changed_is_not_resumed(llm_train, tiny, tmp_path):
    config = tiny()
    assert llm_train("fit", "-c", config, "--trainer.max_steps=8").code == 0
    text = tmp_path / "text.txt"
    before = text.read_text()
    text.write_text(f"{before[::-1]}")
    resume = ("fit", "-c", config, "--ckpt_path=last", "--trainer.max_steps=16")
    done = llm_train(*resume)
    assert done.code == 1
    assert "data: the training examples are not those that the checkpoint was trained on" in done.err
    assert done.err.count("error: ") == 1
    text.write_text(before)
    assert llm_train(*resume).code == 0


def test_the_record_of_a_branch_begins_with_that_of_its_run(llm_train, tiny):
    config, run = tiny(), RUNS / "tiny"
    fit = ("fit", "-c", config, "--trainer.val_check_interval=4")
    assert llm_train(*fit, "--trainer.max_steps=8").code == 0
    assert llm_train(*fit, "--trainer.max_steps=12", "--ckpt_path=last", "--optimizer.lr=0.004").code == 0
    shutil.copy(run / LAST, run / "checkpoints/kept.ckpt")
    kept = run / "checkpoints/kept.ckpt"
    for name, file, rate, steps in (("branch", kept, 0.004, 16), ("other", RUNS / "branch" / BEST, 0.003, 20)):
        flags = (f"--ckpt_path={file}", f"--optimizer.lr={rate}", f"--run.name={name}")
        assert llm_train(*fit, f"--trainer.max_steps={steps}", *flags).code == 0
    assert read_folder(RUNS / "branch").resumed["optimizer.lr"] == "0.01 until step 8 then 0.004"
    step = json.loads((RUNS / "branch/summary.json").read_text())["best"]["step"]
    rates = f"0.01 until step 8 then 0.004 until step {step} then 0.003"
    assert read_folder(RUNS / "other").resumed["optimizer.lr"] == rates


def test_a_second_signal_while_the_run_ends_does_not_cost_its_record(llm_train, tiny, monkeypatch):
    def stop(trainer, *_):
        if trainer.global_step == 10:
            signal.raise_signal(signal.SIGINT)

    def draw(*_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Throughput, "on_train_batch_start", lambda self, trainer, *_: stop(trainer))
    monkeypatch.setattr(LearningCurve, "draw", draw)
    done = llm_train("fit", "-c", tiny())
    assert done.code == 130
    assert f"{RUNS}/tiny (stopped at step 11, " in done.err
    assert "--ckpt_path last" in done.err
    assert json.loads((RUNS / "tiny/summary.json").read_text())["status"] == "stopped"


def test_a_run_that_fails_and_whose_figures_fail_is_recorded_as_failed(llm_train, tiny, monkeypatch):
    def fail(self, trainer, *_):
        if trainer.global_step == 10:
            raise MisconfigurationException("the training failed")

    def draw(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Throughput, "on_train_batch_start", fail)
    monkeypatch.setattr(LearningCurve, "draw", draw)
    assert llm_train("fit", "-c", tiny()).code == 1
    summary = json.loads((RUNS / "tiny/summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"] == "MisconfigurationException: the training failed"


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_sessions(llm_train, tiny, monkeypatch):
    config, summary = tiny(), RUNS / "tiny/summary.json"
    now = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(run_record.time, "monotonic", lambda: float(next(now)))
    assert llm_train("fit", "-c", config, "--trainer.max_steps=8").code == 0
    first = json.loads(summary.read_text())["seconds"]
    saved = torch.load(RUNS / "tiny" / LAST, weights_only=True)["seconds_of_the_run"]
    assert 1000 <= saved <= first
    assert llm_train("fit", "-c", config, "--ckpt_path=last", "--trainer.max_steps=16").code == 0
    assert json.loads(summary.read_text())["seconds"] >= saved + 1000
