"""`fit --auto_resume`: one command that starts a run, resumes it, and does nothing once it is finished."""

import shutil
import signal

import forks
import pytest
from helpers import BEST, LAST, RUNS, assert_same_weights, metrics_that_repeat


def test_one_command_starts_a_run_resumes_it_and_ends_when_it_is_finished(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(), "--run.name", "named", "--auto_resume")
    # A kill before there is a checkpoint, and one right after a checkpoint, with an incomplete row of metrics.
    assert forked(*command, prepare=lambda: forks.signal_after_step(4)) == -signal.SIGKILL
    assert (RUNS / "named/config.yaml").is_file()
    assert not (RUNS / "named" / LAST).exists()
    assert forked(*command, prepare=lambda: forks.die_after_step(16)) == -signal.SIGKILL
    with (RUNS / "named/metrics.csv").open("a") as file:
        file.write("1")
    resumed = llm_train(*command)
    assert (resumed.code, "resuming from" in resumed.err) == (0, True)
    assert_same_weights(whole() / LAST, RUNS / "named" / LAST)
    assert metrics_that_repeat(RUNS / "named") == metrics_that_repeat(whole())

    written = (RUNS / "named" / LAST).stat().st_mtime_ns
    again = llm_train(*command)
    assert (again.code, again.err) == (0, f"{RUNS / 'named'} is finished: nothing is left to do\n")
    assert (RUNS / "named" / LAST).stat().st_mtime_ns == written
    assert "finished at step 28" in llm_train(*command, "--trainer.max_steps", "28").err
    assert [path.name for path in RUNS.iterdir()] == ["named"]


def test_an_earlier_checkpoint_replaces_a_damaged_one(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(), "--run.name", "named", "--auto_resume")
    assert forked(*command, prepare=lambda: forks.die_after_step(8)) == -signal.SIGKILL
    shutil.copytree(RUNS / "named", "kept")
    last = RUNS / "named" / LAST
    last.write_bytes(last.read_bytes()[:5000])
    resumed = llm_train(*command)
    assert resumed.code == 0
    said = resumed.err.splitlines()[0]
    assert f"{last}: the checkpoint is truncated" in said
    assert f"resuming from {RUNS / 'named' / BEST}, step 8" in said
    assert_same_weights(whole() / LAST, last)

    shutil.rmtree(RUNS / "named")
    shutil.copytree("kept", RUNS / "named")
    for name in (LAST, BEST):
        (RUNS / "named" / name).write_bytes(b"no checkpoint")
    refused = llm_train(*command)
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
def test_it_is_for_fit_only_and_finds_the_checkpoint_itself(llm_train, tiny, flags, code, reason):
    command, *rest = flags
    refused = llm_train(command, "-c", tiny(), *rest, "--auto_resume")
    assert (refused.code, len(refused.err.splitlines())) == (code, 1)
    assert reason in refused.err
