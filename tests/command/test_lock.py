"""Two processes and one run: the second is refused, and a killed run's folder is free."""

import multiprocessing
import shutil

import pytest
from forks import TWO_PROCESSES, signal_after_step, start
from helpers import RUNS, contents
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments.run.run_folder import Lock, MisconfigurationException
from lightning_modules.common.files import write_text
from lightning_modules.runtime.checkpoint import RunCheckpoint

RUN = RUNS / "tiny"


def hold_after_step(step: int, reached: multiprocessing.Event, go_on: multiprocessing.Event) -> None:
    """For `prepare`: the process waits after an optimiser step."""
    end = RunCheckpoint.on_train_batch_end

    def end_and_wait(self: RunCheckpoint, trainer: object, *args: object) -> None:
        end(self, trainer, *args)
        if trainer.global_step == step:
            reached.set()
            go_on.wait(60)

    RunCheckpoint.on_train_batch_end = end_and_wait


@pytest.mark.slow
def test_the_second_process_is_refused_in_one_line(llm_train, tiny):
    config = tiny()
    context = multiprocessing.get_context("fork")
    reached, go_on = context.Event(), context.Event()
    first = start("fit", "-c", config, "--auto_resume", prepare=lambda: hold_after_step(12, reached, go_on))
    assert reached.wait(60)
    before = contents(RUN)
    for flags in (["--auto_resume"], ["--ckpt_path", "last"]):
        second = llm_train("fit", "-c", config, *flags)
        assert (second.code, len(second.err.splitlines())) == (1, 1), second.err
        assert f"{RUN} is being trained by process {first.pid} on " in second.err
    assert before == contents(RUN)
    validated = llm_train("validate", "-c", config, "--ckpt_path", "last")  # needs no lock
    assert validated.code == 0, validated.err
    go_on.set()
    first.join()
    assert first.exitcode == 0
    assert not (RUN / ".lock").exists()


@pytest.mark.slow
def test_the_folder_of_a_killed_run_is_free(llm_train, forked, tiny):
    config = tiny(data__init_args__num_workers=1)
    assert forked("fit", "-c", config, prepare=lambda: signal_after_step(12)) < 0
    assert (RUN / ".lock").is_file()
    assert llm_train("fit", "-c", config, "--auto_resume").code == 0


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    removed = []

    def remove_once(file: object, how: int) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())

    monkeypatch.setattr("lightning_modules.common.files.fcntl.lockf", remove_once)
    lock = Lock(tmp_path)
    assert removed
    assert (tmp_path / ".lock").is_file()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def refuse(file: object, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("lightning_modules.common.files.fcntl.lockf", refuse)
    part = tmp_path / f"checkpoints/.last.ckpt.{'0a' * 16}.tmp"
    write_text(part, "of a process that may be writing it")
    Lock(tmp_path).release()
    assert part.is_file()


def test_parts_of_checkpoints_that_a_killed_process_has_left_are_removed(tmp_path):
    for name in (f".last.ckpt.{'0a' * 16}.tmp", f".best.ckpt.{'b' * 32}.tmp", "last.ckpt", ".mine.tmp"):
        write_text(tmp_path / "checkpoints" / name, "")
    Lock(tmp_path).release()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [".mine.tmp", "last.ckpt"]


def test_a_lock_says_who_holds_it(tmp_path, monkeypatch):
    def held(file: object, how: int) -> None:
        raise BlockingIOError

    monkeypatch.setattr("lightning_modules.common.files.fcntl.lockf", held)
    with pytest.raises(MisconfigurationException, match=r"is being trained by another process; wait for it"):
        Lock(tmp_path)


@pytest.mark.parametrize("command", [("fit",), ("fit", "--auto_resume"), ("validate", "--ckpt_path", "best")])
def test_a_process_too_many_is_refused_and_touches_no_run(llm_train, tiny, whole, monkeypatch, command):
    shutil.copytree(whole(), RUNS / "tiny")
    before = contents(RUNS)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as torchrun or srun sets it
    refused = llm_train(*command, "-c", tiny(), "--trainer.max_steps", "48")
    assert (refused.code, "this is process 2 of those that torchrun or srun has started" in refused.err) == (1, True)
    assert contents(RUNS) == before


def test_tasks_of_slurm_that_lightning_refuses_cost_one_line(llm_train, tiny, monkeypatch):
    for name, value in {"JOB_ID": "5", "JOB_NAME": "x", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    refused = llm_train("fit", "-c", tiny(), *TWO_PROCESSES)
    assert (refused.code, refused.err.splitlines()[-1][:9]) == (1, "error: tr")
    assert "Use `--ntasks-per-node=2` instead" in refused.err
    assert "Traceback" not in refused.err
    assert not list(RUNS.iterdir())
