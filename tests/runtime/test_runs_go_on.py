"""Runs that go on: which run is continued, and what becomes of its record."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import BEST, LAST, RUNS
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments.run.run_folder import find, newest
from lightning_modules.optim.schedules import Cosine


def files_of(run):
    """Return the contents of the files that a fit writes."""
    return {name: (run / name).read_bytes() for name in ("config.yaml", "summary.json", "metrics.csv", LAST, BEST)}


@pytest.mark.slow
def test_a_failed_start_and_an_evaluation_of_random_weights_hide_no_run(llm_train, tiny, whole):
    config, run = tiny(), RUNS / "tiny"
    shutil.copytree(whole(), run)
    (RUNS / "tiny.2").mkdir()
    shutil.copy(run / "config.yaml", RUNS / "tiny.2")  # all that a run leaves which fails before its first checkpoint
    evaluated = llm_train("validate", "-c", config)
    assert evaluated.code == 0
    assert "validate without --ckpt_path: the weights are those before training" in evaluated.err
    assert (RUNS / "tiny.3/summary_validate.json").is_file()

    before = files_of(run)
    done = llm_train("fit", "-c", config, "--auto_resume")
    passed = f"{run} is the newest run with a checkpoint; without one: {run}.2, {run}.3\n"
    assert (done.code, done.err) == (0, f"{passed}{run} is finished: nothing is left to do\n")
    trained = llm_train("validate", "-c", config, "--ckpt_path", "best")
    assert (trained.code, "before training" in trained.err) == (0, False), trained.err
    assert (run / "summary_validate.json").is_file()
    assert files_of(run) == before
    assert sorted(path.name for path in RUNS.iterdir()) == ["tiny", "tiny.2", "tiny.3"]


def test_the_run_to_continue_has_the_checkpoint_or_began_to_train(tmp_path):
    def write(*files: str) -> None:
        for file in files:
            path = tmp_path / "topic" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def found(study: str | None = None) -> str | None:
        run = newest(tmp_path, "topic", "name", study)
        return run and run.name

    write("name/config_validate.yaml")
    assert found() is None  # a fit gets a folder of its own
    write("name.2/config.yaml", "name.3/config_validate.yaml")
    assert found() == "name.2"  # a fit that was killed early
    write("name.4/config.yaml", f"name.4/{LAST}", f"name.5/{BEST}", "name.6/config.yaml")
    assert found() == "name.5"
    assert find(tmp_path, "topic", "name", checkpoint="last").path == Path(tmp_path, "topic/name.4")
    assert find(tmp_path, "topic", "name", checkpoint="best").name == "name.5"
    assert find(tmp_path, "topic", "name.6").name == "name.6"  # named with its number
    write("study/name+2/config.yaml", f"study/name+2/{LAST}")
    assert found("study") is None  # an arm repeated by hand, which can have other settings, is not the arm
    with pytest.raises(MisconfigurationException, match=r"there is no run .*/study/name to continue; there is name\+2"):
        find(tmp_path, "topic", "name", "study")
    with pytest.raises(MisconfigurationException, match=r"to continue; there is name\.4, name\.5$"):  # no study
        find(tmp_path, "topic", "other")
    for file in ("name/.lock", "name/config_validate.yaml", f"name/{LAST}"):
        write(f"study/{file}")
        # One that was killed before it wrote anything too: a second folder would hide its checkpoints from the next.
        assert found("study") == find(tmp_path, "topic", "name", "study").name == "name"


@pytest.mark.parametrize("length", [100, 200])
def test_the_rate_does_not_jump_in_silence(length):
    def schedule(total_steps: int) -> Cosine:
        return Cosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3), total_steps, warmup=0.1)

    ended = schedule(100)
    for _ in range(95):
        ended.optimizer.step()
        ended.step()
    (rate,) = ended.get_last_lr()
    resumed = schedule(length)
    resumed.load_state_dict(ended.state_dict())
    assert resumed.get_last_lr() == pytest.approx([rate])
    assert ("stretched" in resumed.change_of_length) == (length == 200)
    # Version 0.1 saved the rate, but neither the length nor the arguments.
    state = {name: value for name, value in ended.state_dict().items() if name not in ("arguments", "warmup_steps")}
    resumed = schedule(length)
    resumed.load_state_dict(state)
    said = "the rate is 0.629 of its peak in place of 0.0076: the checkpoint is of an earlier version, "
    assert resumed.change_of_length == (f"{said}whose length is not known" if length == 200 else "")
