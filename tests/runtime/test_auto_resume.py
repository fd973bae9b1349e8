"""`fit --auto_resume`: one command that starts a run, goes on with it after every fault, and stops when it is done."""

import shutil
import signal
from pathlib import Path

import forks
import pytest
from helpers import assert_same_weights, kill_when

RUNS = Path("runs/decoder_pretrain")
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"


def test_one_command_starts_a_run_goes_on_with_it_and_ends_when_it_is_finished(llm_train, forked, tiny):
    config = tiny()
    llm_train("fit", "-c", config, "--run.name", "whole")
    command = ("fit", "-c", config, "--run.name", "named", "--auto_resume")
    before_any_checkpoint = kill_when(lambda: (RUNS / "named/config.yaml").is_file())
    assert forked(*command, meanwhile=before_any_checkpoint) == -signal.SIGKILL
    assert forked(*command, prepare=lambda: forks.die_after_step(16)) == -signal.SIGKILL
    resumed = llm_train(*command)
    assert (resumed.code, "going on from" in resumed.err) == (0, True)
    assert_same_weights(RUNS / "whole" / LAST, RUNS / "named" / LAST)

    written = (RUNS / "named" / LAST).stat().st_mtime_ns
    again = llm_train(*command)
    assert (again.code, again.err) == (0, f"{RUNS / 'named'} is finished: nothing is left to do\n")
    assert (RUNS / "named" / LAST).stat().st_mtime_ns == written
    assert "finished at step 32" in llm_train(*command, "--trainer.max_steps", "32").err
    assert sorted(path.name for path in RUNS.iterdir()) == ["named", "whole"]


def test_a_damaged_checkpoint_is_passed_over_for_the_earlier_one(llm_train, forked, tiny):
    config = tiny(trainer__max_steps=16)
    llm_train("fit", "-c", config, "--run.name", "whole")
    command = ("fit", "-c", config, "--run.name", "named", "--auto_resume")
    assert forked(*command, prepare=lambda: forks.die_after_step(8)) == -signal.SIGKILL
    shutil.copytree(RUNS / "named", "kept")
    last = RUNS / "named" / LAST
    last.write_bytes(last.read_bytes()[:5000])
    resumed = llm_train(*command)
    assert resumed.code == 0
    said = resumed.err.splitlines()[0]
    assert f"{last}: the checkpoint is truncated" in said
    assert f"going on from {RUNS / 'named' / BEST}, step 8" in said
    assert_same_weights(RUNS / "whole" / LAST, last)

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
def test_it_is_for_fit_alone_and_finds_the_checkpoint_itself(llm_train, tiny, flags, code, reason):
    command, *rest = flags
    refused = llm_train(command, "-c", tiny(), *rest, "--auto_resume")
    assert (refused.code, len(refused.err.splitlines())) == (code, 1)
    assert reason in refused.err
