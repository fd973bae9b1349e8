"""Every YAML in the repository: it parses, and what needs no network runs through the real command."""

import io
import itertools
import math
import re
import shlex
import shutil
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import metrics_page
import pytest
import yaml
from gpu.callbacks import NoSync
from helpers import LAST, TINY, contents
from printed import FOUND, after, experiments_of
from shortened import offline_experiments, run_of, shortened

from experiments.api import load_run
from experiments.class_paths import import_class
from experiments.study.sweep_file import read_sweep_file
from lightning_modules.runtime.steps_to_loss import StepsToLoss
from lightning_modules.runtime.stop import StopOnNonFiniteLoss

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(
    p for p in (ROOT / "experiments").glob("*/*.yaml") if p.parent.name != "trainer" and p.stem != "claims"
)
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


def test_a_source_that_a_comment_names_keeps_no_argument_of_the_one_that_it_replaces():
    flags = re.compile(r"--data\.(\w+)(?:\.class_path)? ((?:datamodules\.|hub:)\S+)((?: --data\.\1\.\S+ \S+)*)")
    replaced = [(path, found) for path in EXPERIMENTS for found in flags.findall(opening(path))]
    assert len({path for path, _ in replaced}) >= 5
    for path, (source, value, others) in replaced:
        written = yaml.safe_load(path.read_text())["data"]["init_args"][source].get("init_args", {})
        taken = {} if value.startswith("hub:") else signature(import_class(value)).parameters
        assert written.keys() & taken.keys() <= set(re.findall(r"\.(\w+) ", others)), path


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


@pytest.mark.parametrize("path", offline_experiments(), ids=name)
def test_every_offline_experiment_runs_shortened_and_would_not_make_the_host_wait_for_a_gpu(
    llm_train, make_what_it_needs, monkeypatch, path
):
    make_what_it_needs(path)
    monkeypatch.setattr(StopOnNonFiniteLoss, "_check", lambda *_: None)  # on the CPU it reads the loss at every step
    no_sync = ("--trainer.log_every_n_steps=3", "--trainer.callbacks+=gpu.callbacks.NoSync")
    done = llm_train("fit", "-c", path, *shortened(path), *no_sync)
    assert done.code == 0, done.err
    assert NoSync.checked
    run = run_of(path)
    assert (run / "config.yaml").is_file()
    assert (run / "summary.json").is_file()
    assert not metrics_page.faults(run)
    assert str(run) in done.err
    loaded, last = load_run(run).module, run / LAST
    assert type(loaded).load_from_checkpoint(last).state_dict().keys() == loaded.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("path", offline_experiments(), ids=name)
def test_the_commands_that_a_run_and_the_documents_print_work_beside_newer_runs_that_they_do_not_touch(
    llm_train, make_what_it_needs, no_pictures, monkeypatch, path
):
    make_what_it_needs(path)
    done = llm_train("fit", "-c", path, *shortened(path))
    assert done.code == 0, done.err
    run = run_of(path)
    (following,) = (line.split("llm-train ", 1)[1] for line in done.err.splitlines() if line.startswith("next "))
    Path("notes.txt").write_text("A reference.\n")
    Path("new.jsonl").write_text('{"text": "Nobody would call it dull."}\n')
    Path("experiments").symlink_to(ROOT / "experiments")
    followed_before = set()
    for name, command in [(str(run), following), *after(str(run))]:
        # Another prompt, or another run of which this one takes the place, is no other command.
        kind = re.sub(r'"[^"]*"|--max_new_tokens \d+', "", command.replace(name, "")).split()
        if tuple(kind) in followed_before:
            continue
        followed_before.add(tuple(kind))
        if not Path(name).exists():
            shutil.copytree(run, name)
        sibling = Path(f"{name}.2")
        if not sibling.exists():
            shutil.copytree(run, sibling)
        before = contents(sibling)
        words = shlex.split(command)
        if words[0] == "generate":
            words += ["--max_new_tokens", "2"]
            monkeypatch.setattr("sys.stdin", io.StringIO("\nWhy?\n"))  # a question without references
        if words[0] == "fit" and (experiments := experiments_of(command)):  # an experiment that reads this run
            words += shortened(experiments[0])
        followed = llm_train(*words)
        assert followed.code == 0, f"{command}: {followed.err}"
        assert before == contents(sibling), command


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_every_study_opens_with_its_question_and_its_last_arm_runs_shortened_and_is_compared(
    llm_train, parse, make_what_it_needs, no_pictures, monkeypatch, path
):
    assert "?" in opening(path), "the comment at the top asks the question of the study"
    assert "# Hardware:" in opening(path)
    assert f"llm-train study {path.relative_to(ROOT)}" in opening(path)
    assert f"studies/{path.name}" in (path.parents[1] / "README.md").read_text(), "the README names the study"

    Path("experiments").symlink_to(ROOT / "experiments")  # a study's command names its files from the repository's root
    command = read_sweep_file(path).command
    base = Path(command[command.index("-c") + 1])
    downloads = any("# Downloads:" in opening(file) for file in (base, path))
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
        # A loss of a few steps reaches the target of every study.
        monkeypatch.setattr(StepsToLoss, "target", property(lambda _: math.inf, lambda *_: None), raising=False)
        often = ("--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1")
        small = shortened(ROOT / base, "all", base.stem, path.stem)
        done = llm_train("fit", *arguments_of(arms[-1]), *small, *often)
        assert done.code == 0, done.err
        follow_study(llm_train, Path(f"runs/{path.parents[1].name}/{path.stem}"))


def follow_study(llm_train, folder: Path) -> None:
    """Compare a run of a study as the documents do, with a copy that has the value of the baseline or another seed."""
    for command in FOUND:
        words = shlex.split(command)
        if words[:2] != ["compare", str(folder)]:
            continue
        run = next(folder.glob("*/config.yaml")).parent
        config = yaml.safe_load((run / "config.yaml").read_text())
        baseline = words[words.index("--baseline") + 1] if "--baseline" in words else "seed_everything=99"
        name, value = baseline.rsplit(".", 1)[-1].split("=", 1)
        section = next(
            part for part in (config, config["model"]["init_args"], config["data"]["init_args"]) if name in part
        )
        # The run itself may be one of the baseline.
        section[name] = next(other for other in (yaml.safe_load(value), "none") if other != section[name])
        shutil.copytree(run, run.with_name(baseline), dirs_exist_ok=True)
        (run.with_name(baseline) / "config.yaml").write_text(yaml.safe_dump(config))
        compared = llm_train(*words)
        assert compared.code == 0, f"{command}: {compared.err}"


def arguments_of(words: Sequence[str]) -> Sequence[str]:
    """Return the arguments after `python -m experiments fit`."""
    return words[words.index("fit") + 1 :]


def test_the_readme_lists_every_topic():
    readme = (ROOT / "README.md").read_text()
    for topic in {path.parent.name for path in EXPERIMENTS}:
        assert f"`{topic}`" in readme
    assert "| TODO |" not in readme, "say what the topic is about"
