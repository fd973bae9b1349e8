"""A run that was killed and resumed ends with the weights and metrics of an uninterrupted one, bit for bit."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import forks
import lightning as L
import pytest
from helpers import BEST, LAST, RUNS, assert_same_weights, contents, metrics_that_repeat

from datamodules import base
from experiments.run.run_folder import runs_named
from lightning_modules.metrics import CorpusLoss
from lightning_modules.runtime import checkpoint, checkpoint_io

# settings, step of the kill, step of the checkpoint
SETTINGS = {
    "validation_at_epoch_ends": (
        {
            "data__init_args__batch_size": 64,
            "trainer__val_check_interval": 1.0,
            "trainer__check_val_every_n_epoch": 1,
        },
        13,
        9,
    ),
    "several_epochs_of_random_windows_with_accumulation_and_workers": (
        {
            "data__init_args__batch_size": 32,
            "data__init_args__windows": "random",
            "data__init_args__num_workers": 1,
            "trainer__accumulate_grad_batches": 2,
            "trainer__val_check_interval": 10,
        },
        13,
        10,
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
    assert runs_named(RUNS, "killed") == [RUNS / "killed"]


def die_in_write(nth: int) -> None:
    """For `prepare`: the process kills itself in the middle of the nth checkpoint that it writes."""
    writes = []
    save = checkpoint_io.torch.save

    def half_save(checkpoint: dict, file: object) -> None:
        writes.append(1)
        if len(writes) == nth:
            file.write(b"PK half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(checkpoint, file)

    checkpoint_io.torch.save = half_save


def die_before_link() -> None:
    """For `prepare`: the process kills itself when a checkpoint would get its second name."""
    checkpoint.link_or_copy = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_last_step_is_validated_whatever_the_interval(llm_train, tiny):
    settings = {"trainer__val_check_interval": 8, "trainer__max_steps": 11}
    assert llm_train("fit", "-c", tiny(**settings), "--run.name", "odd").code == 0
    header, *rows = metrics_that_repeat(RUNS / "odd")
    assert [row[0] for row in rows if row[header.index("val/loss")]] == ["8", "11"]
    assert checkpoint_io.AtomicCheckpointIO().load_checkpoint(RUNS / "odd" / BEST)["global_step"] == 11
    # The run goes on as if it had not stopped there.
    longer = tiny(**settings | {"trainer__max_steps": 24, "trainer__log_every_n_steps": 1})
    assert llm_train("fit", "-c", longer, "--run.name", "odd", "--ckpt_path", "last").code == 0
    header, *rows = metrics_that_repeat(RUNS / "odd")
    assert [row[0] for row in rows if row[header.index("val/loss")]] == ["8", "11", "16", "24"]
    assert [row[0] for row in rows if int(row[0]) > 11] == [str(step) for step in range(12, 25)]


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["", "a file system without links"])
def test_a_checkpoint_is_written_once_and_the_best_stays_when_the_last_goes_on(
    llm_train, forked, tiny, monkeypatch, links
):
    writes = []
    save = checkpoint_io.AtomicCheckpointIO.save_checkpoint

    def counted(self, content: dict, path: str, **options: object) -> None:
        writes.append((Path(path).name, content["global_step"]))
        save(self, content, path, **options)

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(checkpoint_io.AtomicCheckpointIO, "save_checkpoint", counted)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    assert llm_train("fit", "-c", tiny(), "--run.name", "once", "--trainer.max_steps", 8).code == 0
    best, last = RUNS / "once" / BEST, RUNS / "once" / LAST
    assert writes == [("best.ckpt", 8)]
    assert best.samefile(last) == links
    assert best.read_bytes() == last.read_bytes()
    before = best.read_bytes()
    goes_on = ("fit", "-c", tiny(), "--run.name", "once", "--ckpt_path", "last")
    assert forked(*goes_on, prepare=lambda: forks.signal_after_step(10, signal.SIGTERM)) == 128 + signal.SIGTERM
    assert (best.read_bytes() == before, saved_step("once")) == (True, 10)
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.slow
def test_one_command_resumes_after_each_kind_of_kill_and_ends_when_the_run_is_finished(llm_train, tiny, whole):
    command, run = ("fit", "-c", tiny(), "--run.name", "named", "--auto_resume"), RUNS / "named"
    output = Path("output.txt")

    def killed(prepare) -> str:
        """Run the command until it is killed, and return what it printed."""
        output.unlink(missing_ok=True)
        assert forks.wait([forks.start(*command, prepare=prepare, output=output)]) == [-signal.SIGKILL]
        return output.read_text()

    # Before there is a checkpoint.
    killed(lambda: forks.signal_after_step(4))
    assert (run / "config.yaml").is_file()
    assert not (run / LAST).exists()
    # Between two checkpoints, in the middle of an epoch.
    killed(lambda: forks.signal_after_step(13))
    assert saved_step("named") == 8
    # The checkpoint is damaged, so that the earlier one replaces it; then a kill while best.ckpt of step 16 is written.
    damaged = (run / LAST).read_bytes()[:5000]
    (run / LAST).unlink()  # it is the file of best.ckpt too
    (run / LAST).write_bytes(damaged)
    said = killed(lambda: die_in_write(1)).splitlines()[0]
    assert f"{run / LAST}: the checkpoint is truncated" in said
    assert f"resuming from {run / BEST}, step 8" in said
    assert len(list((run / "checkpoints").glob(".*.ckpt.*"))) == 1  # incomplete, under a temporary name
    assert checkpoint_io.AtomicCheckpointIO().load_checkpoint(run / BEST)["global_step"] == 8
    shutil.copy(run / BEST, run / LAST)
    # Between best.ckpt of step 16 and its second name.
    killed(die_before_link)
    assert checkpoint_io.AtomicCheckpointIO().load_checkpoint(run / BEST)["global_step"] == 16
    assert saved_step("named") == 8
    # Right after a checkpoint, with an incomplete row of metrics.
    killed(lambda: forks.die_after_step(16))
    with (run / "metrics.csv").open("a") as file:
        file.write("1")
    resumed = llm_train(*command)
    assert (resumed.code, "resuming from" in resumed.err) == (0, True)
    assert_same_weights(whole() / LAST, run / LAST)
    assert metrics_that_repeat(run) == metrics_that_repeat(whole())

    written = (run / LAST).stat().st_mtime_ns
    again = llm_train(*command)
    assert (again.code, again.err) == (0, f"{run} is finished: nothing is left to do\n")
    assert (run / LAST).stat().st_mtime_ns == written
    assert "finished at step 28" in llm_train(*command, "--trainer.max_steps", "28").err
    assert [path.name for path in RUNS.iterdir()] == ["named"]


def test_auto_resume_refuses_a_run_whose_checkpoints_are_all_damaged(llm_train, tiny, whole):
    shutil.copytree(whole(), RUNS / "named", ignore=shutil.ignore_patterns("summary.json"))
    for name in (LAST, BEST):
        (RUNS / "named" / name).write_bytes(b"no checkpoint")
    refused = llm_train("fit", "-c", tiny(), "--run.name", "named", "--auto_resume")
    assert refused.code == 1
    assert "auto_resume: no checkpoint can be read" in refused.err.splitlines()[-1]
    assert (RUNS / "named" / BEST).read_bytes() == b"no checkpoint"


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (["fit", "--ckpt_path", "last"], 1, "auto_resume finds the checkpoint itself: leave ckpt_path out"),
        (["validate"], 2, "unrecognized arguments: --auto_resume"),
    ],
)
def test_auto_resume_is_for_fit_only_and_finds_the_checkpoint_itself(llm_train, tiny, flags, code, reason):
    command, *rest = flags
    refused = llm_train(command, "-c", tiny(), *rest, "--auto_resume")
    assert (refused.code, len(refused.err.splitlines())) == (code, 1)
    assert reason in refused.err


@pytest.mark.slow
def test_signals_save_a_checkpoint_and_the_run_resumes_from_it(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(), "--run.name", "stopped")
    # The checkpoint is of the step in progress, not of the validation at step 8 or 16.
    for step, signal_number, code in ((12, signal.SIGTERM, 143), (18, signal.SIGINT, 130)):
        assert forked(*command, prepare=lambda s=step, n=signal_number: forks.signal_after_step(s, n)) == code
        assert '"status": "stopped"' in (RUNS / "stopped/summary.json").read_text()
        assert saved_step("stopped") == step
        command = ("fit", "-c", tiny(), "--run.name", "stopped", "--ckpt_path", "last")
    assert llm_train(*command).code == 0
    assert_same_weights(whole() / LAST, RUNS / "stopped" / LAST)
    assert metrics_that_repeat(RUNS / "stopped") == metrics_that_repeat(whole())


@pytest.mark.slow
def test_a_signal_to_the_group_spares_the_workers_of_the_loader(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(data__init_args__num_workers=2), "--run.name", "group")
    assert forked(*command, prepare=lambda: forks.signal_after_step(12, signal.SIGTERM, group=True)) == 143
    assert saved_step("group") == 12
    assert llm_train(*command, "--ckpt_path", "last").code == 0
    assert_same_weights(whole() / LAST, RUNS / "group" / LAST)


def signal_in(owner: type, method: str, call: int) -> None:
    """For `prepare`: the process sends SIGTERM to a group of its own in the middle of a call of a method."""
    os.setpgid(0, 0)
    original, calls = getattr(owner, method), []

    def called(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == call:
            os.kill(0, signal.SIGTERM)
        return original(*args, **kwargs)

    setattr(owner, method, called)


def start_a_worker_slowly() -> None:
    """For `prepare`: the second worker of a loader starts when the first has loaded batches."""
    original = base.leave_signals_to_the_parent

    def later(worker: int) -> None:
        end = time.monotonic() + 0.5 * worker
        while time.monotonic() < end:
            time.sleep(0.01)
        original(worker)

    base.leave_signals_to_the_parent = later


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "method", "workers"),
    [(CorpusLoss, "update", 2), (checkpoint_io.AtomicCheckpointIO, "save_checkpoint", 0)],
    ids=["validation", "checkpoint"],
)
def test_a_signal_to_the_group_in_a_validation_or_a_checkpoint(forked, tiny, owner, method, workers):
    command = ("fit", "-c", tiny(data__init_args__num_workers=workers), "--run.name", "group")

    def prepare() -> None:
        start_a_worker_slowly()
        signal_in(owner, method, 1)

    assert forked(*command, prepare=prepare) == 143
    assert saved_step("group") == 8


def leave_the_workers() -> None:
    """For `prepare`: a second signal comes before the trainer has ended the workers of its loaders."""
    forks.signal_after_step(12, signal.SIGTERM)

    def teardown(trainer: L.Trainer) -> None:
        signal.raise_signal(signal.SIGTERM)

    L.Trainer._teardown = teardown


@pytest.mark.slow
def test_a_second_signal_ends_a_run_whose_workers_are_left(forked, tiny):
    assert forked("fit", "-c", tiny(data__init_args__num_workers=2), prepare=leave_the_workers) == 143


@pytest.mark.slow
def test_a_configuration_in_a_run_folder_means_that_run_also_beside_a_newer_one(llm_train, tiny, whole):
    for name in ("moved", "whole.2"):
        shutil.copytree(whole(), RUNS / name)
    before = contents(RUNS / "whole.2")
    config = RUNS / "moved/config.yaml"  # it was recorded as `whole`, of which `whole.2` is the newest run
    assert llm_train("validate", "-c", config, "--ckpt_path", "best").code == 0
    assert (RUNS / "moved/summary_validate.json").is_file()
    done = llm_train("fit", "-c", config, "--auto_resume")
    assert (done.code, f"{RUNS}/moved is finished" in done.err) == (0, True), done.err
    assert llm_train("fit", "-c", config, "--ckpt_path", "last", "--trainer.max_steps", "26").code == 0
    assert saved_step("moved") == 26
    assert contents(RUNS / "whole.2") == before
    flags = ("--ckpt_path", "last", "--run.name", "whole", "--trainer.max_steps", "24")  # names another run
    other = llm_train("fit", "-c", config, *flags)
    assert (other.code, other.err.splitlines()[-1]) == (0, f"{RUNS}/whole.2 is finished: nothing is left to do")
    assert contents(RUNS / "whole.2") == before


@pytest.mark.slow
def test_a_name_with_brackets_and_unicode_is_resumed(llm_train, tiny):
    name = "Étude № 1, lr[1e-2]"
    command = ("fit", "-c", tiny(trainer__max_steps=8), "--run.name", name, "--auto_resume")
    assert llm_train(*command).code == 0
    assert llm_train(*command, "--trainer.max_steps", "12").code == 0
    assert [path.name for path in RUNS.iterdir()] == [name]
    assert saved_step(name) == 12


@pytest.mark.parametrize("name", ["sub/run", "/abs", ".", ".."])
def test_a_name_that_is_no_folder_is_refused(llm_train, tiny, name):
    done = llm_train("fit", "-c", tiny(), "--run.name", name)
    assert (done.code, done.err.splitlines()[-1].startswith("error: run.name:")) == (1, True), done.err
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("given", ["best", RUNS / "tiny" / BEST])
def test_a_fit_from_another_checkpoint_than_the_last_gets_a_folder_of_its_own(llm_train, tiny, whole, given):
    shutil.copytree(whole(), RUNS / "tiny")
    before = contents(RUNS / "tiny")
    none_left = llm_train("fit", "-c", tiny(), "--ckpt_path", given, "--trainer.max_steps", "8")
    assert (none_left.code, none_left.err.splitlines()[-1]) == (
        0,
        f"{RUNS}/tiny/{BEST} is finished: nothing is left to do",
    )
    assert [path.name for path in RUNS.iterdir()] == ["tiny"]
    worse = ("--trainer.max_steps", "28", "--optimizer.lr", "100")
    done = llm_train("fit", "-c", tiny(), "--ckpt_path", given, *worse)
    assert done.code == 0
    assert f"{RUNS}/tiny exists; this run is tiny.2\n" in done.err
    assert contents(RUNS / "tiny") == before
    assert saved_step("tiny.2") == 28
    # The best of a run is one whose weights it has, not that of the run before it.
    assert (RUNS / "tiny.2" / BEST).is_file()
    assert json.loads((RUNS / "tiny.2/summary.json").read_text())["best"]["step"] == 28


@pytest.mark.slow
def test_the_saved_configuration_repeats_the_run(llm_train, whole):
    assert llm_train("fit", "-c", whole() / "config.yaml").code == 0
    assert_same_weights(whole() / LAST, RUNS / "whole" / LAST)
