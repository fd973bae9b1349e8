"""The commands in READMEs, in the comments of YAML files and in messages: each is run as it is written, but small.

tests/command/test_experiments.py runs those that name an experiment, a study or a run of an experiment.
"""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import RUNS, TINY, contents, text
from printed import FOUND, experiments_of, kind_of, runs_of, stand_in
from shortened import ROOT, needs, offline_experiments, run_of, shortened

from experiments.__main__ import COMMANDS

# Commands that other tests run, and which.
ELSEWHERE = {
    "fit -c FILE -c trainer/ddp --trainer.devices 8": "tests/runtime, in two processes",
    "fit -c FILE -c trainer/fsdp --trainer.devices 8": "tests/runtime, in two processes",
    "study TOPIC/STUDY --jobs 2": "tests/study",
    "study TOPIC/STUDY --jobs 8": "tests/study",
    "study TOPIC/STUDY --launcher slurm --slurm.partition gpu --slurm.gpus 1 --slurm.time 8:00:00": "tests/study",
    "study TOPIC/STUDY --launcher slurm --slurm.nodes 2 --slurm.ntasks_per_node 8 --slurm.gpus_per_node 8 "
    "-- -c trainer/slurm --trainer.num_nodes 2": "tests/study",
    "fit -c FILE.yaml --trainer.callbacks+ my_package.MyCallback": "tests/command/test_working_folder.py",
}
READS_TOKENIZER = ROOT / "experiments" / TINY.parent.name / "offline.yaml"
BY_OTHER_TESTS = ("experiment", "study", "run", "compare", "guide", "claims")


def downloads(experiment: Path) -> bool:
    """Return whether conf.yaml of the topic has nothing small in place of what an experiment downloads.

    tests/finetuning/test_rehearsals.py runs those that download a model.
    """
    conf = yaml.safe_load((ROOT / "tests" / experiment.parent.name / "conf.yaml").read_text())
    return "# Downloads:" in experiment.read_text() and experiment.stem not in conf


VARIANTS = [command for command in FOUND if kind_of(command) == "variant" and not downloads(experiments_of(command)[0])]
GENERAL = [command for command in FOUND if kind_of(command) == "general" and command not in ELSEWHERE]


def test_commands_are_found():
    assert len(FOUND) > 80
    assert {command.split()[0] for command in FOUND} <= COMMANDS.keys()


def test_every_command_is_run_by_a_test():
    ours = [*VARIANTS, *GENERAL, *ELSEWHERE]
    others = [command for command in FOUND if kind_of(command) not in (*BY_OTHER_TESTS, "variant")]
    assert [command for command in others if command not in ours] == []
    assert [command for command in ELSEWHERE if command not in FOUND] == []
    # The tests of the experiments run the rest, after a run, or an arm of a study, that they train.
    runs = [str(run_of(path)) for path in offline_experiments()]
    studies = [f"runs/{path.parents[1].name}/{path.stem}" for path in ROOT.glob("experiments/*/studies/*.yaml")]
    for command in FOUND:
        if kind_of(command) in ("run", "compare"):
            (named,) = runs_of(command)
            assert named in studies if kind_of(command) == "compare" else stand_in(named) in runs, command


def test_the_commands_name_files_that_are_there():
    named = {word for command in FOUND for word in shlex.split(command) if word.startswith("experiments/")}
    assert [word for word in named if "TOPIC" not in word and not (ROOT / word).is_file()] == []


@pytest.fixture
def files(tmp_path: Path) -> None:
    """Write the files that the commands assume."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    rows = [f"{word} film,{label},{film}" for film in range(40) for word, label in (("fine", 1), ("dull", 0))]
    (tmp_path / "films.csv").write_text("\n".join(["text,label,movie", *rows, ""]))
    np.save(tmp_path / "ROWS.npy", np.random.default_rng(0).normal(size=(24, 8)).astype("float32"))
    for name in ("input.txt", "pg1513.txt", "pg11.txt", "brown/ca01", "brown/ca02"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("ROMEO:\n" + text(5_000).replace(". ", ".\n"))


@pytest.mark.slow
@pytest.mark.parametrize("command", VARIANTS)
def test_an_experiment_with_other_settings_runs_shortened(llm_train, files, make_what_it_needs, no_pictures, command):
    experiment = experiments_of(command)[0]
    make_what_it_needs(READS_TOKENIZER if "FOLDER" in command else experiment)
    command = command.replace("FOLDER", f"{run_of(needs(READS_TOKENIZER)[0])}/tokenizer").replace("=FILE", "=films.csv")
    words = shlex.split(command)
    at = words.index("-c") + 2
    small = shortened(experiment)
    if "--data.source.paths" in words:  # the text that the user names, not that of the test
        overlay = Path(small[1])
        config = yaml.safe_load(overlay.read_text())
        del config["data"]["init_args"]["source"]
        overlay.write_text(yaml.safe_dump(config))
    length = ("--trainer.max_steps=4", "--trainer.val_check_interval=4") if "--trainer.max_steps" in words else ()
    done = llm_train(*words[:at], *small, *words[at:], *length)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_the_commands_of_the_front_page_run_on_any_experiment(llm_train, tiny, whole, files, no_pictures):
    config, run = tiny("whole"), RUNS / "whole"
    shutil.copytree(whole(), run)
    sibling = shutil.copytree(run, run.with_name("whole.2"))
    before = contents(sibling)
    names = {"FILE.yaml": str(config), "FILE": str(config), "runs/TOPIC/NAME": str(run), "runs/TOPIC/STUDY": str(RUNS)}
    names["TOPIC/offline"] = str(config)
    for command in sorted(GENERAL, key=lambda command: "runs/" not in command):  # then those that make runs
        words = [re.sub("|".join(names), lambda found: names[found[0]], word) for word in shlex.split(command)]
        if words[0] == "fit" and not {"--ckpt_path", "--auto_resume"} & set(words):
            words += ["--trainer.max_steps=4", "--trainer.val_check_interval=4"]
        if "--devices 8" in command:  # which share a batch
            words += ["--data.batch_size=8"]
        done = llm_train(*words, *(("--trainer.accelerator=cpu",) if "trainer/gpu" in command else ()))
        assert done.code == 0, f"{command}: {done.err}"
        if "runs/" in command:
            assert before == contents(sibling), command


@pytest.mark.parametrize("command", [command for command in FOUND if command.startswith("study") and "=" in command])
def test_a_study_with_other_settings_is_planned(llm_train, files, command):
    planned = llm_train(*shlex.split(command), "--dry_run")
    assert planned.code == 0, planned.err
    flag = command.split()[-1]
    assert all(flag in line for line in planned.out.splitlines())


@pytest.mark.slow
def test_the_next_command_of_a_run_without_a_tokenizer_works(llm_train, tiny):
    callbacks = [{"class_path": "lightning_modules.runtime.checkpoint.RunCheckpoint"}]
    done = llm_train("fit", "-c", tiny(trainer__callbacks=callbacks))
    (following,) = (line for line in done.err.splitlines() if line.startswith("next"))
    assert following == f"next    llm-train validate -c {RUNS}/tiny/config.yaml --ckpt_path best"
    assert llm_train(*shlex.split(following)[2:]).code == 0
    # Without a validation there is no best checkpoint, and nothing to validate.
    done = llm_train("fit", "-c", tiny(trainer__callbacks=callbacks, trainer__limit_val_batches=0))
    assert "val     none, since trainer.limit_val_batches is 0; the run writes no best checkpoint" in done.err
    assert "next" not in done.err
