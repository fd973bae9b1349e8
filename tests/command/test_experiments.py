"""Every YAML in the repository: it parses, and what needs no network runs through the real command."""

import io
import itertools
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import metrics_page
import pytest
from gpu.callbacks import NoSync
from helpers import TINY
from shortened import needs, offline_experiments, run_of, shortened

from experiments.study.sweep_file import read_sweep_file
from lightning_modules.runtime.stop import StopOnNonFiniteLoss

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(p for p in (ROOT / "experiments").glob("*/*.yaml") if p.parent.name != "trainer")
PRESETS = sorted(p for p in (ROOT / "experiments/trainer").glob("*.yaml") if p.name != "defaults.yaml")
STUDIES = sorted((ROOT / "experiments").glob("*/studies/*.yaml"))


def name(path: Path) -> str:
    return "/".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)


def opening(path: Path) -> str:
    """Return the comment at the top of a YAML."""
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_every_experiment_parses_and_opens_with_hardware_and_command(parse, path):
    config = parse("fit", "-c", path)
    assert config["model"]["class_path"].startswith(f"lightning_modules.{path.parent.name}.")
    assert config["data"]["class_path"].startswith(f"datamodules.{path.parent.name}.")
    assert "Hardware:" in opening(path)
    assert f"llm-train fit -c {path.relative_to(ROOT)}" in opening(path)
    assert path.name in (path.parent / "README.md").read_text()


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if "# Hardware: one GPU" in opening(path)], ids=name)
def test_experiments_for_a_gpu_train_in_bfloat16_and_tf32(parse, path):
    preset = ROOT / "experiments/trainer/gpu.yaml"
    with_preset = f"-c {preset.relative_to(ROOT)}" in opening(path)
    trainer = parse("fit", "-c", path, *(("-c", preset) if with_preset else ()))["trainer"]
    assert trainer["precision"] == "bf16-mixed"
    tf32 = [callback for callback in trainer["callbacks"] if callback["class_path"].endswith(".TF32")]
    assert tf32, "the callback TF32 speeds up the products that stay in float32"


@pytest.fixture(scope="module")
def plain(parse) -> dict[str, Any]:
    return parse("fit", "-c", TINY)


@pytest.mark.parametrize("preset", PRESETS, ids=name)
def test_every_preset_goes_over_an_experiment_and_changes_no_learning_setting(parse, plain, preset):
    moved = parse("fit", "-c", TINY, "-c", preset)
    assert {key for key in plain if plain[key] != moved[key]} == {"config", "trainer"}
    learning = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
    assert [moved["trainer"][key] for key in learning] == [plain["trainer"][key] for key in learning]


@pytest.fixture
def make_what_it_needs(llm_train, tmp_path_factory, monkeypatch) -> Callable[[Path], None]:
    """Return a function that makes the runs that a YAML needs, and before them the runs that those need.

    A YAML names them in lines `# Needs: llm-train fit -c FILE`. A run, and the data that it reads, is made once in a
    test session.
    """
    made_before = tmp_path_factory.getbasetemp() / "made_before"
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(made_before / "cache"))

    def make(path: Path) -> None:
        for needed in needs(path):
            make_one(path, needed)

    def make_one(path: Path, needed: Path) -> None:
        run, command = run_of(needed), f"fit -c {needed.relative_to(ROOT)}"
        if not (made_before / run).exists():
            missing = llm_train("fit", "-c", path, *shortened(path))
            # The error for a missing input names the command.
            assert (missing.code, command in missing.err) == (1, True), missing.err
            make(needed)
            made = llm_train("fit", "-c", needed, *shortened(needed))
            assert made.code == 0, made.err
            shutil.copytree(run, made_before / run)
        shutil.copytree(made_before / run, run, dirs_exist_ok=True)

    return make


@pytest.mark.parametrize("path", offline_experiments(), ids=name)
def test_every_offline_experiment_runs_shortened_and_would_not_make_the_host_wait_for_a_gpu(
    llm_train, make_what_it_needs, monkeypatch, path
):
    make_what_it_needs(path)
    monkeypatch.setattr(StopOnNonFiniteLoss, "_check", lambda self: None)  # on the CPU it reads the loss at every step
    no_sync = ("--trainer.log_every_n_steps=3", "--trainer.callbacks+=gpu.callbacks.NoSync")
    done = llm_train("fit", "-c", path, *shortened(path), *no_sync)
    assert done.code == 0, done.err
    assert NoSync.checked
    run = run_of(path)
    assert (run / "config.yaml").is_file()
    assert (run / "summary.json").is_file()
    assert not metrics_page.faults(run)
    assert str(run) in done.err
    follow(llm_train, monkeypatch, run, done.err)


def follow(llm_train, monkeypatch, run: Path, printed: str) -> None:
    """Run the command that a run prints as the next one, beside a newer run of the same name that it must not touch."""
    sibling = run.with_name(f"{run.name}.2")
    shutil.copytree(run, sibling)
    before = {path: path.read_bytes() for path in sibling.rglob("*") if path.is_file()}
    (command,) = (line.split("llm-train ", 1)[1] for line in printed.splitlines() if line.startswith("next "))
    words = shlex.split(command)
    if words[0] == "generate":
        words += ["--max_new_tokens", "2"]
        monkeypatch.setattr("sys.stdin", io.StringIO())  # a chat ends with its input
    if words[0] == "fit":  # another experiment, which reads this run
        Path("experiments").symlink_to(ROOT / "experiments")
        words += shortened(ROOT / words[2])
    followed = llm_train(*words)
    assert followed.code == 0, f"{command}: {followed.err}"
    assert before == {path: path.read_bytes() for path in sibling.rglob("*") if path.is_file()}


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_every_study_opens_with_its_question_and_its_last_arm_runs_shortened(
    llm_train, parse, make_what_it_needs, path
):
    assert "?" in opening(path), "the comment at the top asks the question of the study"
    assert "# Hardware:" in opening(path)
    assert f"llm-train study {path.relative_to(ROOT)}" in opening(path)
    assert f"studies/{path.name}" in (path.parents[1] / "README.md").read_text(), "the README names the study"

    Path("experiments").symlink_to(ROOT / "experiments")  # a study's command names its files from the repository's root
    command = read_sweep_file(path).command
    base = Path(command[command.index("-c") + 1])
    downloads = "# Downloads:" in opening(base)
    if not downloads:
        make_what_it_needs(base)
    planned = llm_train("study", path, "--dry_run")
    assert planned.code == 0, planned.err
    runs = [shlex.split(line) for line in planned.out.splitlines()]
    arms = list(dict.fromkeys(tuple(word for word in run if "seed" not in word) for run in runs))
    parse(
        "fit", *itertools.chain(*map(arguments_of, arms))
    )  # flags are checked one by one, also those that others replace
    if not downloads:
        done = llm_train("fit", *arguments_of(arms[-1]), *shortened(ROOT / base))
        assert done.code == 0, done.err


def arguments_of(words: Sequence[str]) -> Sequence[str]:
    """Return the arguments after `python -m experiments fit`."""
    return words[words.index("fit") + 1 :]


def test_the_readme_lists_every_topic():
    readme = (ROOT / "README.md").read_text()
    for topic in {path.parent.name for path in EXPERIMENTS}:
        assert f"`{topic}`" in readme
    assert "| TODO |" not in readme, "say what the topic is about"
