"""Every YAML in the repository: it parses, and what needs no network runs through the real command."""

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from experiments.study.sweep_file import read_sweep_file

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(p for p in (ROOT / "experiments").glob("*/*.yaml") if p.parent.name != "trainer")
PRESETS = sorted(p for p in (ROOT / "experiments/trainer").glob("*.yaml") if p.name != "defaults.yaml")
OFFLINE = [path for path in EXPERIMENTS if path.name.startswith("offline")]
STUDIES = sorted((ROOT / "experiments").glob("*/studies/*.yaml"))


def name(path: Path) -> str:
    return "/".join(path.relative_to(ROOT / "experiments").with_suffix("").parts)


def opening(path: Path) -> str:
    """The comment at the top of a YAML."""
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


def shortened(path: Path) -> tuple[str, ...]:
    """Flags that make an experiment small enough for a test: `all` of its topic's conf.yaml, then its own section."""
    sections = yaml.safe_load((ROOT / "tests" / path.parent.name / "conf.yaml").read_text())
    flags: list[str] = []
    for section in ("all", path.stem):
        if section in sections:
            overlay = Path(f"{section}.conf.yaml")
            overlay.write_text(yaml.safe_dump(sections[section]))
            flags += ["-c", str(overlay)]
    return tuple(flags)


def run_of(path: Path) -> Path:
    """The folder of the run that a YAML makes, unless it is given another name."""
    return Path("runs") / path.parent.name / path.stem


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_every_experiment_parses_and_opens_with_what_a_user_must_know(llm_train, path):
    parsed = llm_train("fit", "-c", path, "--print_config")
    assert parsed.code == 0, parsed.err
    config = yaml.safe_load(parsed.out)
    assert config["model"]["class_path"].startswith(f"lightning_modules.{path.parent.name}.")
    assert config["data"]["class_path"].startswith(f"datamodules.{path.parent.name}.")
    assert "Hardware:" in opening(path)
    assert f"llm-train fit -c {path.relative_to(ROOT)}" in opening(path)
    assert path.name in (path.parent / "README.md").read_text()


@pytest.mark.parametrize("preset", PRESETS, ids=name)
def test_every_preset_goes_over_an_experiment_and_changes_no_learning_setting(llm_train, tiny, preset):
    plain = yaml.safe_load(llm_train("fit", "-c", tiny(), "--print_config").out)
    moved = llm_train("fit", "-c", tiny(), "-c", preset, "--print_config")
    assert moved.code == 0, moved.err
    moved = yaml.safe_load(moved.out)
    assert {key for key in plain if plain[key] != moved[key]} <= {"trainer"}
    learning = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
    assert [moved["trainer"][key] for key in learning] == [plain["trainer"][key] for key in learning]


@pytest.fixture
def make_what_it_needs(llm_train, tmp_path_factory, monkeypatch) -> Callable[[Path], None]:
    """Makes the runs that the `# Needs: llm-train fit -c FILE` lines of a YAML name, and first what those need.

    Such a run, and the data that is read for it, is made once in a process of the tests.
    """
    made_before = tmp_path_factory.getbasetemp() / "made_before"
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(made_before / "cache"))

    def make(path: Path) -> None:
        for command in re.findall(r"^# Needs: llm-train (fit -c .*)", path.read_text(), re.MULTILINE):
            make_one(path, command)

    def make_one(path: Path, command: str) -> None:
        *_, needed = command.split()
        run = run_of(Path(needed))
        if not (made_before / run).exists():
            missing = llm_train("fit", "-c", path, *shortened(path))
            assert (missing.code, command in missing.err) == (1, True)  # a missing input names what makes it
            make(ROOT / needed)
            made = llm_train("fit", "-c", ROOT / needed, *shortened(ROOT / needed))
            assert made.code == 0, made.err
            shutil.copytree(run, made_before / run)
        shutil.copytree(made_before / run, run, dirs_exist_ok=True)

    return make


@pytest.mark.parametrize("path", OFFLINE, ids=name)
def test_every_offline_experiment_runs_shortened(llm_train, make_what_it_needs, path):
    make_what_it_needs(path)
    done = llm_train("fit", "-c", path, *shortened(path))
    assert done.code == 0, done.err
    run = run_of(path)
    assert (run / "config.yaml").is_file()
    assert (run / "summary.json").is_file()
    assert str(run) in done.err


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_every_study_says_what_it_asks_and_its_last_arm_runs_shortened(llm_train, make_what_it_needs, path):
    assert "?" in opening(path)
    assert "Hardware:" in opening(path)
    assert f"llm-train study {path.relative_to(ROOT)}" in opening(path)
    assert f"studies/{path.name}" in (path.parents[1] / "README.md").read_text()

    Path("experiments").symlink_to(ROOT / "experiments")  # a study's command names its files from the repository's root
    command = read_sweep_file(path).command
    base = Path(command[command.index("-c") + 1])
    downloads = "ithout a network" in opening(base)
    if not downloads:
        make_what_it_needs(base)
    planned = llm_train("study", path, "--dry_run")
    assert planned.code == 0, planned.err
    runs = [shlex.split(line) for line in planned.out.splitlines()]
    # An arm is what runs have in common that differ in the seed, and so in the name.
    *others, last = dict.fromkeys(tuple(word for word in words if "seed" not in word) for words in runs)
    for words in others:
        parsed = llm_train(*arguments_of(words), "--print_config")
        assert parsed.code == 0, parsed.err
    done = llm_train(*arguments_of(last), *(("--print_config",) if downloads else shortened(ROOT / base)))
    assert done.code == 0, done.err


def arguments_of(words: Sequence[str]) -> Sequence[str]:
    """What follows `python -m experiments`."""
    return words[words.index("experiments") + 1 :]


def test_the_readme_lists_every_topic():
    readme = (ROOT / "README.md").read_text()
    for topic in {path.parent.name for path in EXPERIMENTS}:
        assert f"`{topic}`" in readme
