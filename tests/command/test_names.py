"""Experiments, presets and studies by name, in a folder of the user that has none of them, some of them, or others."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY

from experiments import names
from experiments.study.runs import own_package

ROOT = Path(__file__).parents[2]
TOPIC = TINY.parent.name
STUDY = next((ROOT / "experiments" / TOPIC / "studies").glob("*.yaml")).stem


def write(*files: str) -> None:
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("trainer: {max_steps: 3}\n")


# files of the working folder, name, the file that is meant; a file of the project is below SHIPPED
FOUND = [
    ([], f"{TOPIC}/offline", f"SHIPPED/{TOPIC}/offline.yaml"),
    ([], f"{TOPIC}/offline.yaml", f"SHIPPED/{TOPIC}/offline.yaml"),
    ([], f"experiments/{TOPIC}/offline.yaml", f"SHIPPED/{TOPIC}/offline.yaml"),
    ([], "trainer/gpu", "SHIPPED/trainer/gpu.yaml"),
    ([], f"{TOPIC}/{STUDY}", f"SHIPPED/{TOPIC}/studies/{STUDY}.yaml"),
    ([], f"experiments/{TOPIC}/studies/{STUDY}", f"SHIPPED/{TOPIC}/studies/{STUDY}.yaml"),
    (["experiments/other/x.yaml"], f"{TOPIC}/offline", f"SHIPPED/{TOPIC}/offline.yaml"),
    (["mine.yaml"], "mine", "mine.yaml"),
    (["mine.yml"], "mine.yml", "mine.yml"),
    ([f"{TOPIC}/offline.yaml"], f"{TOPIC}/offline", f"{TOPIC}/offline.yaml"),
    ([f"experiments/{TOPIC}/offline.yaml"], f"{TOPIC}/offline", f"experiments/{TOPIC}/offline.yaml"),
    (["experiments/mine/studies/width.yaml"], "mine/width", "experiments/mine/studies/width.yaml"),
    (["mine/studies/width.yaml"], "mine/width", "mine/studies/width.yaml"),
    ([], f"./{TOPIC}/offline", None),
    ([], f"../{TOPIC}/offline.yaml", None),
    ([], TOPIC, None),
    ([], "", None),
    ([f"{TOPIC}/notes.txt"], TOPIC, None),  # a folder
]


@pytest.mark.parametrize(("files", "name", "expected"), FOUND)
def test_a_name_is_a_file_of_the_working_folder_or_else_of_the_project(files, name, expected):
    write(*files)
    found = names.find(name)
    assert found == (expected and Path(expected.replace("SHIPPED", str(names.SHIPPED))))


def test_every_experiment_and_study_has_a_name():
    named = [*names.names()]
    assert len(named) == len(set(named)) > 50
    assert [name for name in named if names.find(name) is None] == []
    assert [name for name in named if name.endswith("/claims")] == []  # a YAML file of another kind


@pytest.mark.parametrize("words", [["-c", "{}"], ["--config", "{}"], ["--config={}"], ["-c{}"], ["-c={}"]])
def test_a_name_stands_wherever_a_file_of_settings_does(words):
    name, file = f"{TOPIC}/offline", str(names.SHIPPED / TOPIC / "offline.yaml")
    given, meant = ([word.format(value) for word in words] for value in (name, file))
    assert names.with_files(["fit", *given, "--trainer.max_steps", "1"]) == ["fit", *meant, "--trainer.max_steps", "1"]


def test_flags_are_yielded_as_they_are_written():
    words = ["fit", "-cx", "-c=y", "--config", "z", "--trainer.callbacks+=A", "--data.source+", "B=1", "--help"]
    assert [*names.flags(words)] == [
        ("-c", "x"),
        ("-c", "y"),
        ("--config", "z"),
        ("--trainer.callbacks+", "A"),
        ("--data.source+", "B=1"),
        ("--help", ""),
    ]


@pytest.mark.parametrize("word", ["{trainer: {max_steps: 1}}", "seed_everything: 1", "--trainer.max_steps"])
def test_settings_in_place_of_a_file_stay_as_they_are(word):
    assert names.with_files(["fit", "-c", word]) == ["fit", "-c", word]


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["fit", "-c", f"{TOPIC}/ofline"], f"did you mean '{TOPIC}/offline'?"),
        (["fit", "-c", f"experiments/{TOPIC}/ofline.yaml"], f"did you mean '{TOPIC}/offline'?"),
        (["validate", "--config=trainer/gpuu"], "did you mean 'trainer/gpu'?"),
        (["fit", "-c", "mien.yaml"], "did you mean 'mine'?"),
        (["study", f"{TOPIC}/{STUDY}x"], f"did you mean '{TOPIC}/{STUDY}'?"),
    ],
)
def test_a_name_that_is_none_is_one_line_with_a_similar_one(llm_train, command, hint):
    write("mine.yaml")
    done = llm_train(*command)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert hint in done.err


def test_a_name_that_is_none_is_answered_without_torch():
    program = """
import sys
from experiments.__main__ import main
try:
    main(["fit", "-c", "nothing/of_this_name"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr[:32]) == (2, "False\n", "error: -c nothing/of_this_name: ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["validate", "-c", "runs/topic/name"],
            "-c runs/topic/name: is a folder; did you mean 'runs/topic/name/config.yaml'?",
        ),
        (["fit", "--config=runs/topic/"], "--config runs/topic/: is a folder; give a YAML file or a name"),
        (["study", "runs/topic"], "study runs/topic: is a folder; give a YAML file or a name"),
    ],
)
def test_a_folder_is_no_file_of_settings(llm_train, command, said):
    write("runs/topic/name/config.yaml")
    done = llm_train(*command)
    assert (done.code, done.err) == (2, f"error: {said}\n")


def test_a_study_and_its_runs_are_found_in_a_folder_without_them(llm_train):
    done = llm_train("study", f"{TOPIC}/{STUDY}", "--dry_run", "--runs=1")
    assert done.code == 0, done.err
    words = done.out.split()
    run = words[words.index("fit") :]
    files = [word.rpartition("=")[2] for word in names.with_files(run) if word.endswith(".yaml")]
    assert files
    assert all(Path(file).is_file() for file in files)


def test_runs_of_a_study_are_of_this_project_in_a_folder_with_a_package_of_its_name():
    write("experiments/__init__.py")
    Path("experiments/__init__.py").write_text("raise SystemExit('foreign')")
    program = [sys.executable, "-m", "experiments", "--help"]
    done = subprocess.run(program, env=own_package({"PYTHONPATH": "/nowhere"}), capture_output=True, text=True)
    assert (done.returncode, "llm-train COMMAND" in done.stdout) == (0, True), done.stderr


def test_a_name_runs(llm_train, tiny):
    tiny()
    flags = ("--print_config", "--trainer.max_steps", "1")
    printed = llm_train("fit", "-c", "tiny", "-c", "trainer/cpu", *flags)
    assert (printed.code, "n_embd: 16" in printed.out) == (0, True), printed.err
