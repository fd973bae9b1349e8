"""Where the runs of a study are started: on the GPUs of this machine, and as jobs of SLURM."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fake_slurm
import forks
import pytest
import submitit
from helpers import LAST, RUNS, assert_same_weights
from stub_runs import GRID, STUDY, assert_wandb_is_its_own, given, trials

from experiments.study import command, launchers
from experiments.study.gpus import visible_gpus
from experiments.study.journal import Journal
from experiments.study.launchers import LocalLauncher
from experiments.study.runs import Attempt, Plan
from experiments.study.slurm import SlurmJob, SlurmLauncher, task_of
from experiments.study.sweep_file import read_sweep_file

FOUR = {"seed_everything": {"values": [1, 2, 3, 4]}}


# GPUs of this machine


def test_four_jobs_have_four_gpus(llm_train, sweep, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    done = llm_train("study", sweep(parameters=FOUR), "--jobs=4")
    assert (done.code, "share" in done.err) == (0, False), done.err
    seen = [given(f"seed={seed}")["environment"]["CUDA_VISIBLE_DEVICES"] for seed in (1, 2, 3, 4)]
    assert seen == ["0", "1", "2", "3"]


class Started:
    """A process in place of a run's, with the variables that the run has got."""

    seen: ClassVar[list[str | None]] = []

    def __init__(self, words: list[str], *, env: dict[str, str], **_: object) -> None:
        self.seen.append(env.get("CUDA_VISIBLE_DEVICES"))

    def poll(self) -> int | None:
        """Say that the first run has ended, and no other."""
        return 0 if len(self.seen) > 2 else None


@pytest.mark.parametrize(
    ("visible", "jobs", "flags", "seen", "shared"),
    [
        ("GPU-a,MIG-b, 5 ,-1,7", 3, [], ["GPU-a", "MIG-b", "5"], False),  # what follows -1 is not visible
        ("0,1", 3, [], ["0", "1", "0"], True),
        ("0,1,2,3", 2, ["--trainer.devices=auto"], ["0,1", "2,3"], False),
        ("0,1,2,3", 2, ["--trainer.devices", "auto", "--trainer={'devices': 3}"], ["0,1,2", "3,0,1"], True),
        ("0,1,2,3", 2, ["-c", "trainer/ddp"], ["0,1", "2,3"], False),
        ("0,1,2,3", 2, ["-ctrainer/ddp"], ["0,1", "2,3"], False),
        ("0,1,2,3", 2, ["-c", "trainer/ddp", "-c", "trainer/cpu"], ["0,1,2,3"] * 2, False),
        ("0,1,2,3", 2, ["--trainer.devices=[1]"], ["0,1,2,3"] * 2, False),  # by their numbers among all
        ("0,1", 1, [], ["0,1"], False),
        ("", 2, [], ["", ""], False),
    ],
)
def test_a_run_gets_gpus_of_those_that_are_visible(sweep, monkeypatch, capfd, visible, jobs, flags, seen, shared):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(launchers, "Popen", Started)
    monkeypatch.setattr(Started, "seen", [])
    plan = Plan(read_sweep_file(sweep(parameters=FOUR)), STUDY, flags, n_runs=4, jobs=jobs, seed=0)
    journal, launcher = Journal(plan, in_memory=True), LocalLauncher(plan)
    (STUDY / "logs").mkdir(parents=True)
    with Path("lock").open("wb") as lock:
        launcher.start([journal.next() for _ in seen], lock)
    assert Started.seen == seen
    said = [line for line in capfd.readouterr().err.splitlines() if "share" in line]
    assert said == ([f"gpus    {jobs} jobs share {len(visible.split(','))} GPUs"] if shared else [])


LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-1)
  MIG 3g.20gb     Device  0: (UUID: MIG-2)
  MIG 3g.20gb     Device  1: (UUID: MIG-3)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-4)
"""


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "{LISTED}"\n')
    program.chmod(0o755)
    assert visible_gpus() == ["MIG-2", "MIG-3", "GPU-4"]
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert visible_gpus() == []


# Jobs of SLURM


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a SLURM on the PATH, whose jobs end with the test."""
    monkeypatch.setenv("PATH", f"{fake_slurm.install(tmp_path)}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    monkeypatch.setattr(fake_slurm, "JOBS", tmp_path / "slurm")
    monkeypatch.setattr(SlurmLauncher, "pause", 0.05)
    monkeypatch.setattr(SlurmLauncher, "refresh", 0.3)
    yield
    for job in fake_slurm.jobs():
        job.end("CANCELLED")


def until(happens: Callable[[], object]) -> None:
    """Wait until something has happened, for a minute at most."""
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def in_background(do: Callable[[], None]) -> threading.Thread:
    """Start a thread that ends with the test."""
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


def lines(arm: str, file: str) -> int:
    """Return how many lines a file of an arm has."""
    path = STUDY / arm / file
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_jobs_outlive_the_study_and_go_on_after_an_interruption(slurm, llm_train, sweep, tmp_path, monkeypatch):
    path = sweep(parameters={"lr": {"value": 0.3}, "end": {"values": ["well", "fails"]}}, project="theirs")
    options = ("--slurm.partition", "gpu", "--slurm.time=8:00:00", "--jobs=1")
    words = ("study", path, "--launcher", "slurm", *options, "--act=wait")
    first = forks.start(*words, output=tmp_path / "first.txt")
    until(lambda: lines("end=well", "metrics.csv") == 4)
    os.kill(first.pid, signal.SIGTERM)
    assert forks.wait([first]) == [143]
    printed = (tmp_path / "first.txt").read_text()
    assert "slurm   job 7: 2 runs" in printed
    assert "the jobs go on, and the same command finds them; `scancel 7` ends them" in printed
    one, two = fake_slurm.jobs()
    assert (one.id, one.state, two.id, two.state) == ("7_0", "RUNNING", "7_1", "PENDING")
    assert one.read("step") == str(given("end=well")["pid"])  # the task is the run, and gets its signals
    for line in ("--partition=gpu", "--time=8:00:00", "--requeue", "--signal=TERM@300", "--array=0-1%1"):
        assert f"#SBATCH {line}\n" in one.read("script")

    here = llm_train("study", path, "--act=wait")
    assert (here.code, here.err) == (1, f"error: {STUDY}/end=well was submitted to SLURM; use --launcher slurm again\n")
    shorter = sweep("other.yaml", parameters={"lr": {"value": 0.3}, "end": {"values": ["well"]}})  # without that of 7_1
    other = llm_train("study", shorter, "--name=sweep", *words[2:])
    assert (other.code, f"{STUDY} was begun with other parameters" in other.err) == (1, True), other.err
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_SLURM", "")
        assert "error: squeue fails, so the jobs of this study cannot be found: squeue: error:" in llm_train(*words).err

    def interrupt() -> None:
        one.time_is_almost_up()
        until(lambda: lines("end=fails", "metrics.csv") == 4)
        two.preempt()

    interrupted = in_background(interrupt)
    done = llm_train(*words)
    interrupted.join()
    assert done.code == 1
    assert "2 runs, 0 of them done, 2 submitted before" in done.err
    assert "[1/2] end=well  val/loss 0.1500" in done.err
    assert "[2/2] end=fails  failed: it was told to fail" in done.err
    assert [(job.state, job.read("restarts")) for job in fake_slurm.jobs()] == [("COMPLETED", "1"), ("FAILED", "1")]
    for arm in ("end=well", "end=fails"):
        assert (lines(arm, "starts"), given(arm)["ckpt_path"]) == (2, "last")
        assert given(arm)["environment"]["WANDB_PROJECT"] == "theirs"
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "FAIL"]


@pytest.mark.slow
def test_the_log_of_a_run_of_two_nodes_has_the_output_of_the_first_and_its_wandb_is_its_own(
    slurm, llm_train, sweep, in_a_run_of_wandb
):
    path = sweep(parameters={"lr": {"values": [0.3, 0.1]}}, project="theirs")
    nodes = ("--slurm.nodes=2", "--slurm.ntasks_per_node=1", "--slurm.gpus_per_node=1")
    done = llm_train("study", path, "--launcher=slurm", *nodes)
    assert done.code == 0, done.err
    for job, arm in zip(fake_slurm.jobs(), ("lr=0.3", "lr=0.1"), strict=True):
        assert "#SBATCH --array=0-1%2\n" in job.read("script")
        assert len(job.read("step").split()) == 2
        assert (STUDY / f"logs/{arm}.log").read_text() == "hello\n"
        assert_wandb_is_its_own(arm)


@pytest.mark.slow
def test_a_run_that_slurm_ends_has_failed_and_is_submitted_again(slurm, llm_train, sweep, tmp_path):
    words = ("study", sweep(), "--runs=1", "--launcher=slurm", "--act=wait")

    def time_is_up() -> None:
        until(lambda: lines("lr=0.3,seed=1", "metrics.csv") == 4)
        fake_slurm.jobs()[0].end("TIMEOUT")

    ended = in_background(time_is_up)
    done = llm_train(*words)
    ended.join()
    assert (done.code, "[1/1] lr=0.3,seed=1  failed: SLURM has ended job 7: TIMEOUT" in done.err) == (1, True), done.err
    Path("go").touch()
    (link,) = (STUDY / "logs/slurm").glob(".submission_file_*")
    link.unlink()
    link.symlink_to(tmp_path / "earlier" / link.name)  # the working folder has been moved
    done = llm_train(*words)
    assert (done.code, "slurm   job 8: 1 run" in done.err) == (0, True), done.err


def test_a_job_is_missing_after_two_looks_at_the_queue_since_its_submission(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    before = time.monotonic()
    answers = iter([before, before, before + 1_000, before + 2_000])
    launcher = SimpleNamespace(folder=tmp_path, queue=lambda: (next(answers), {}))
    job = SlurmJob(launcher, SimpleNamespace(log=tmp_path / "log", is_finished=False), "7")
    assert [job.poll() for _ in range(4)] == [None, None, None, 1]
    assert (tmp_path / "log").read_text() == "error: SLURM has ended job 7: its accounting gives no reason\n"


def test_a_study_with_a_target_submits_one_run_at_a_time(slurm, llm_train, sweep):
    done = llm_train("study", sweep(metric={"name": "val/loss", "target": 1}), "--launcher=slurm")
    assert (done.code, "the target is reached" in done.err) == (0, True), done.err
    assert [job.state for job in fake_slurm.jobs()] == ["COMPLETED"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeues", "written"),
    [
        (0, "", True, "0\n"),
        (1, "", True, "1\n"),
        (143, "199", True, ""),
        (143, "", False, "143\n"),
        (143, "200", True, "143\n"),
    ],
)
def test_the_end_of_a_batch_script(slurm, sweep, tmp_path, code, restarts, requeues, written):
    launcher = SlurmLauncher(Plan(read_sweep_file(sweep()), STUDY, [], n_runs=1, jobs=1, seed=0), {})
    launcher.folder.mkdir(parents=True)
    script = "\n".join([f"scontrol() {{ {str(requeues).lower()}; }}", f"(exit {code})", *launcher.afterwards])
    job = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": restarts}
    assert subprocess.run(["bash", "-c", script], env=os.environ | job).returncode == code
    file = launcher.folder / "7_1.code"
    assert (file.read_text() if file.exists() else "") == written


@pytest.mark.slow
def test_a_run_that_is_stopped_early_is_cancelled(slurm, llm_train, sweep):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    path = sweep(parameters={"lr": {"values": [0.1, 0.9]}}, early_terminate=rule)
    done = llm_train("study", path, "--launcher=slurm", "--jobs=1", "--act=wait")
    assert (done.code, "[2/2] lr=0.9  val/loss 0.4500, stopped early" in done.err) == (0, True), done.err
    assert [job.state for job in fake_slurm.jobs()] == ["COMPLETED", "CANCELLED by 1000"]
    assert (STUDY / "lr=0.9/checkpoints/last.ckpt").exists()


class OnThisMachine(SlurmLauncher):
    """The launcher with the executor of submitit that starts processes of this machine."""

    def __init__(self, plan: Plan, options: dict[str, str]) -> None:
        super().__init__(plan, options)
        self._executor = submitit.LocalExecutor(self.folder)

    def _submit(self, runs: list[Attempt]) -> list[str]:
        self.submitted = [self._executor.submit(task_of(run)) for run in runs]
        return [job.job_id for job in self.submitted]

    def queue(self) -> tuple[float, dict[str, str]]:
        """Return the jobs that are alive."""
        return time.monotonic(), {job.job_id: "" for job in self.submitted if not job.done()}


@pytest.mark.slow
def test_runs_are_jobs_of_the_local_executor_of_submitit(slurm, llm_train, sweep, monkeypatch):
    monkeypatch.setattr(command, "SlurmLauncher", OnThisMachine)
    path = sweep(parameters=GRID | {"end": {"values": ["well", "fails"]}})
    done = llm_train("study", path, "--launcher=slurm", "--runs=2")
    assert (done.code, "(1 of 2 runs done, 1 failed)" in done.err) == (1, True)
    assert "] lr=0.3,seed=1,end=well  val/loss 0.1500" in done.err
    assert "] lr=0.3,seed=1,end=fails  failed: " in done.err


def test_what_a_launcher_cannot_do_costs_one_line(slurm, llm_train, sweep, monkeypatch, tmp_path):
    def error(*args: str) -> str:
        done = llm_train("study", sweep(), *args)
        assert done.code
        assert len([line for line in done.err.splitlines() if "error" in line]) == 1
        return done.err.splitlines()[-1]

    assert "invalid choice: 'slrum' (choose from 'local', 'slurm') (did you mean 'slurm'?)" in error("--launcher=slrum")
    assert error("--slurm.time=60") == "error: --slurm.time needs --launcher slurm"
    assert "--slurm.array: the study sets it; leave it out" in error("--launcher=slurm", "--slurm.array=0-3")
    assert not Path("runs").exists()
    partition = error("--launcher=slurm", "--slurm.partion", "gpu")
    assert partition == "error: sbatch: unrecognized option '--partion=gpu'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        assert error("--launcher=slurm") == "error: --launcher slurm needs submitit: pip install submitit"
    (tmp_path / "slurm_bin/sbatch").unlink()
    assert error("--launcher=slurm") == "error: --launcher slurm: there is no sbatch here; use a machine that has it"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert (
        error("--jobs=2", "--trainer.devices=4", "--name=other")
        == "error: lr=0.3,seed=1 asks for 4 devices, and there are 2 GPUs"
    )


@pytest.mark.slow  # 10 seconds of processor time
def test_the_real_command_ends_with_the_same_weights_after_an_interruption(slurm, llm_train, sweep, tiny, whole):
    settings = {"trainer__max_steps": 300, "trainer__val_check_interval": 50}
    uninterrupted = whole(**settings)
    command = ["${env}", "${interpreter}", "-m", "experiments", "fit", "-c", str(tiny(**settings)), "${args}"]
    path = sweep("real.yaml", command=command, parameters={"seed_everything": {"value": 5}})
    run = RUNS / "real/run=1"

    def interrupt() -> None:
        until(lambda: (run / LAST).exists())
        fake_slurm.jobs()[0].time_is_almost_up()

    interrupted = in_background(interrupt)
    done = llm_train("study", path, "--launcher=slurm")
    interrupted.join()
    assert done.code == 0, (done.err, (RUNS / "real/logs/run=1.log").read_text())
    assert fake_slurm.jobs()[0].read("restarts") == "1"
    assert_same_weights(run / LAST, uninterrupted / LAST)
