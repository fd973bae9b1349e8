"""`llm-train compare` on runs whose means and intervals are known."""

import base64
import contextlib
import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
import yaml
from helpers import with_settings
from matplotlib.axes import Axes

from experiments.comparison import command, figures, tables
from experiments.comparison.arms import ABSENT, arms_of, compared, differing_settings, show_values
from experiments.comparison.measures import Measure, choose_metrics, measures_of, mode_of
from experiments.comparison.runs import RunResult, Series, find_runs, flatten, read_folder, read_wandb
from experiments.comparison.statistics import estimate
from experiments.errors import UserError
from experiments.study.journal import goal_of
from experiments.study.names import shortest_ending
from lightning_modules.common.files import csv_text

T_2 = 4.302652729911275  # Student's t, 0.975, two degrees of freedom

WriteRun = Callable[..., Path]


def write_run_in(
    folder: Path,
    name: str,
    losses: Sequence[float] = (3.0, 2.0),
    seed: int = 0,
    status: str | None = "finished",
    columns: Mapping[str, Sequence[float]] | None = None,
    monitor: tuple[str, str] = ("val/loss", "min"),
    **settings: object,
) -> Path:
    """Write a run folder: `val/loss` at steps 10, 20, …, and settings over a small configuration, by dotted key."""
    checkpoint = "lightning_modules.runtime.checkpoint.RunCheckpoint"
    config = {
        "seed_everything": seed,
        "trainer": {
            "max_steps": 20,
            "logger": [{"class_path": "lightning_modules.runtime.loggers.WandbRecorder", "init_args": {"group": name}}],
            "callbacks": [{"class_path": checkpoint, "init_args": {"monitor": monitor[0], "mode": monitor[1]}}],
        },
        "model": {"class_path": "models.decoder.Decoder", "init_args": {"n_layer": 2, "dropout": 0.0}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "betas": [0.9, 0.99]}},
        "run": {"name": name, "topic": "topic"},
    }
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(with_settings(config, settings), sort_keys=False))
    (run / "environment.json").write_text("[]")
    columns = columns if columns is not None else {"val/loss": losses}
    rows = ([10 * step, 0, *row] for step, row in enumerate(zip(*columns.values(), strict=True), start=1))
    (run / "metrics.csv").write_text(csv_text(["step", "epoch", *columns], rows))
    if status:
        error = "ValueError: loss is nan" if status == "failed" else None
        (run / "summary.json").write_text(json.dumps({"status": status, "error": error}))
    return run


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write run folders in `runs`."""
    return partial(write_run_in, tmp_path / "runs")


def write_two_arms(folder: Path) -> None:
    """Write two depths with three seeds each; the deeper is better by 0.1, 0.2 and 0.3, and gets worse after that."""
    for seed, loss in enumerate((2.0, 2.2, 2.4)):
        write_run_in(folder, f"n_layer=2,seed={seed}", (3.0, loss), seed)
        losses = (loss - 0.1 * (seed + 1), loss + 1)
        write_run_in(folder, f"n_layer=4,seed={seed}", losses, seed, model__init_args__n_layer=4)


@pytest.fixture
def two_arms() -> Path:
    """Write the two arms in `runs`."""
    write_two_arms(Path("runs"))
    return Path("runs")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Compare the two arms once; give the folder and the output of the command."""
    folder = tmp_path_factory.mktemp("comparison")
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        write_two_arms(Path("runs"))
        command.main(["compare", "runs", "--out", "a & b"])
    return SimpleNamespace(folder=folder / "a & b", out=output.getvalue(), err=errors.getvalue())


@pytest.fixture
def empty_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save no picture: that takes most of the time of a small comparison."""

    def save(_: object, file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return file

    monkeypatch.setattr(command, "save_figure", save)


def read_csv(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


# --- numbers ---


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.7834, 1.7934, 1.7734], "1.783 ± 0.025"),
        ([100.0, 300.0, 200.0], "200 ± 250"),
        ([2763.0, 306.0], "1,500 ± 16,000"),
        ([13.0, 155.0], "84 ± 900"),
        ([1e6, 3e6, 2e6], "2,000,000 ± 2,500,000"),
        ([1.0, 1.0], "1.000"),
        ([1234.567], "1,235"),
        ([0.0], "0"),
        ([-0.21, 0.2], "0.0 ± 2.6"),
        ([math.inf], "inf"),
    ],
)
def test_numbers_are_rounded_by_their_interval(values, shown):
    mean, half_width, _ = estimate(values)
    assert tables.with_interval(mean, half_width) == shown


# --- settings and arms ---


def test_a_configuration_is_flattened_to_the_keys_of_the_command_line():
    nested = {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1, "betas": [1, 2]}},
        "trainer": {
            "callbacks": [
                {"class_path": "a.b.C"},
                {"class_path": "a.b.D", "init_args": {"x": None}},
                {"class_path": "a.b.E"},
                {"class_path": "e.D", "init_args": {"x": 1}},
            ]
        },
        "data": {"class_path": "d.e.F", "init_args": {}},
    }
    assert flatten(nested) == {
        "optimizer": "torch.optim.SGD", "optimizer.lr": 1, "optimizer.betas": [1, 2],
        "trainer.callbacks.C": "a.b.C", "trainer.callbacks.D": "a.b.D", "trainer.callbacks.D.x": None,
        "trainer.callbacks.E": "a.b.E", "trainer.callbacks.D.2": "e.D", "trainer.callbacks.D.2.x": 1,
        "data": "d.e.F",
    }  # fmt: skip


def run_with(seed: int = 0, loss: float = 1.0, **settings: object) -> RunResult:
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    metrics = {"val/loss": Series(np.array([1, 2]), np.array([9.0, loss]))}
    return RunResult(f"run{seed}", "finished", "", settings, {"seed_everything": seed}, {}, metrics)


def test_arguments_that_follow_from_a_class_are_not_a_difference():
    adam = {"optimizer": "torch.optim.Adam", "optimizer__lr": 1, "optimizer__betas": 1, "same": 1}
    sgd = {"optimizer": "torch.optim.SGD", "optimizer__lr": 1, "optimizer__momentum": 0.9, "same": 1}
    assert differing_settings([run_with(**adam), run_with(**sgd)]) == ["optimizer"]
    runs = [run_with(**adam), run_with(**sgd), run_with(**sgd | {"optimizer__momentum": 0})]
    assert differing_settings(runs) == ["optimizer", "optimizer.momentum"]
    assert arms_of(runs)[0].shown == {"optimizer": "Adam", "momentum": "–"}


def test_names_are_as_short_as_they_can_be_without_clashing():
    for names, short in (
        (["optimizer.lr", "model.n_layer"], ["lr", "n_layer"]),
        (["optimizer.lr", "lr_scheduler.lr", "optimizer"], ["optimizer.lr", "lr_scheduler.lr", "optimizer"]),
        (["optimizer", "model.optimizer"], ["optimizer", "model.optimizer"]),
    ):
        assert [shortest_ending(name, names) for name in names] == short
    shown = show_values(["models.initialization.xavier", "models.initialization.kaiming", None, True, 3, ABSENT])
    assert list(shown.values()) == ["xavier", "kaiming", "null", "true", "3", "–"]
    assert list(show_values(["models.gpt2.init", "models.gpt_neo.init"]).values()) == ["gpt2.init", "gpt_neo.init"]
    assert list(show_values([0.1, 1e-05, 0.123456789]).values()) == ["0.1", "1e-05", "0.1235"]
    assert list(show_values([0.1000001, 0.1000002]).values()) == ["0.1000001", "0.1000002"]
    assert list(show_values(["text.txt", "a/b.tar.gz"]).values()) == ["text.txt", "a/b.tar.gz"]


@pytest.mark.parametrize(("key", "name"), [("data.n", "data.n"), ("a.b.status", "b.status"), ("data.m", "m")])
def test_no_setting_has_the_name_of_another_column(key, name):
    arms = arms_of([run_with(**{key: value}) for value in (1, 2)])
    assert list(arms[0].shown) == [name]
    header, _ = tables.results_with_all_digits(arms, [])
    assert len(set(header)) == len(header)


def test_metrics_that_are_settings_have_their_whole_names(write_run):
    monitored = ("val/loss", "val/accuracy")
    runs = [read_folder(write_run(name[4:], monitor=(name, "min"))) for name in monitored]
    assert [arm.label for arm in arms_of(runs)] == ["monitor=val/accuracy", "monitor=val/loss"]


def test_a_whole_number_is_one_setting_however_it_is_written():
    assert len(arms_of([run_with(warmup=4), run_with(1, warmup=4.0)])) == 1
    assert len(arms_of([run_with(flag=1), run_with(1, flag=True)])) == 2


def test_arms_are_in_the_order_of_their_values():
    arms = arms_of([run_with(width=value) for value in (1024, 8, 256, None)])
    assert [arm.label for arm in arms] == ["width=null", "width=8", "width=256", "width=1024"]
    assert [arm.label for arm in arms_of([run_with(0), run_with(1)])] == ["all runs"]


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val/loss", "min"), ("val/bits_per_byte", "min"), ("test/error_rate", "min"), ("val/accuracy/far", "max"),
        ("val/f1", "max"), ("val/auroc", "max"), ("val/rougeL", "max"), ("val/seen/position_explained", "max"),
        ("val/attention_entropy", None), ("train/lossless", None), ("val/mine", "max"),
    ],
)  # fmt: skip
def test_the_name_of_a_metric_tells_which_value_is_best(metric, mode):
    assert mode_of(metric, [run_with()], maximize=["val/mine"], minimize=[]) == mode
    assert mode_of(metric, [run_with()], maximize=[], minimize=[metric]) == "min"


def test_the_goal_of_a_study_decides_which_value_is_best(llm_train, write_run):
    for number, values in enumerate([(3.0, 1.0), (2.5, 2.0)]):
        write_run(f"study/arm={number}", values, model__init_args__n_layer=number)
    asked = {"op_code": 2, "user_attr": {"asked": {"metric": {"name": "val/loss", "goal": "maximize"}}}}
    Path("runs/study/journal.log").write_text('{"op_code": 0}\n' + json.dumps(asked) + "\n{half")
    assert goal_of(Path("runs/study")) == ("val/loss", "maximize")
    assert llm_train("compare", "runs/study").code == 0
    with Path("runs/study/comparison/runs.csv").open() as file:
        best = [float(row["val/loss, best"]) for row in csv.DictReader(file)]
    assert best == [3.0, 2.5]
    assert mode_of("val/loss", [run_with()], [], ["val/loss"], {"val/loss": "maximize"}) == "min"  # the user's word


def test_the_best_value_is_by_the_mode_and_ignores_nan():
    run = RunResult("", "finished", "", {}, {}, {}, {"m": Series(np.arange(4), np.array([2.0, 1.0, 3.0, math.nan]))})
    assert Measure("m", "best", "min").of(run) == 1.0
    assert Measure("m", "best", "max").of(run) == 3.0
    assert math.isnan(Measure("m", "last", "min").of(run))
    assert Measure("other", "last", "min").of(run) is None


# --- the command ---


def test_two_arms_are_compared_by_seed(comparison):
    assert comparison.err == ""
    half_width = T_2 * 0.1 / math.sqrt(3)
    markdown = (comparison.folder / "table.md").read_text().splitlines()
    assert markdown[:4] == [
        "| n_layer | n | val/loss, best | val/loss, last |",
        "| --- | --- | --- | --- |",
        "| 2 | 3 | 2.20 ± 0.50 | 2.20 ± 0.50 |",
        "| 4 | 3 | 2.00 ± 0.25 | 3.20 ± 0.50 |",
    ]
    assert "| n_layer=4 | n_layer=2 | val/loss, best | -0.20 ± 0.42 | not clear | Welch, 3 and 3 runs |" in markdown
    assert "| n_layer=4 | n_layer=2 | val/loss, last | +1.00 ± 0.57 | worse | Welch, 3 and 3 runs |" in markdown
    assert markdown[-2] == "2 comparisons, corrected together by Holm's procedure."
    assert markdown[-1].endswith("; --metrics and --baseline choose fewer.")
    assert half_width == pytest.approx(0.25, abs=0.005)
    assert "n_layer  n  val/loss, best  val/loss, last\n" in comparison.out
    assert "-0.20 ± 0.42" in comparison.out

    table = read_csv(comparison.folder / "table.csv")
    assert float(table[1]["val/loss, best, low"]) == pytest.approx(2.0 - half_width)
    runs = read_csv(comparison.folder / "runs.csv")
    assert [row["seed"] for row in runs] == ["0", "1", "2"] * 2
    assert [float(row["val/loss, best"]) for row in runs[3:]] == pytest.approx([1.9, 2.0, 2.1])
    assert runs[0]["run"] == "runs/n_layer=2,seed=0"


def test_curves_are_means_with_their_intervals(comparison):
    points = read_csv(comparison.folder / "curves.csv")
    assert [(p["arm"], p["step"]) for p in points] == [(f"n_layer={n}", str(step)) for n in (2, 4) for step in (10, 20)]
    last = {key: float(points[1][key]) for key in ("value", "low", "high")}
    half_width = T_2 * 0.2 / math.sqrt(3)
    assert last == pytest.approx({"value": 2.2, "low": 2.2 - half_width, "high": 2.2 + half_width})


def test_the_page_needs_no_other_file(comparison):
    page = (comparison.folder / "index.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)|https?://|@import|url\(", page)
    assert "llm-train compare runs --out &#x27;a &amp; b&#x27;" in page
    images = [base64.b64decode(image) for image in re.findall(r"base64,([^\"]+)", page)]
    assert images == [(comparison.folder / name).read_bytes() for name in ("summary.png", "curves.png")]
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert "<td>2.00 ± 0.25</td>" in page
    assert page.count("runs/n_layer=") == 6


@pytest.mark.usefixtures("empty_images")
def test_unfinished_and_damaged_runs_stay_out_of_the_means(llm_train, two_arms, write_run):
    write_run("n_layer=2,seed=3", (50.0, 50.0), 3, status=None)
    write_run("n_layer=2,seed=4", (60.0, 60.0), 4, status="stopped")
    write_run("n_layer=8,seed=0", (70.0, 70.0), 0, status="failed", model__init_args__n_layer=8)
    empty_config(write_run("bad", seed=9))
    done = llm_train("compare", two_arms)
    assert done.err.splitlines() == [
        "skipped runs/bad: config.yaml holds no settings",
        "left out runs/n_layer=2,seed=3: unfinished",
        "left out runs/n_layer=2,seed=4: stopped",
        "left out runs/n_layer=8,seed=0: failed (ValueError: loss is nan)",
    ]
    markdown = (two_arms / "comparison/table.md").read_text()
    assert "| 2 | 3 | 1 stopped, 1 unfinished | 2.20 ± 0.50 | 2.20 ± 0.50 |" in markdown
    assert "| 8 | 0 | 1 failed | – | – |" in markdown
    assert "Left out of the means: 3 of 9 runs (1 failed, 1 stopped, 1 unfinished)." in done.out
    assert "Skipped, since they cannot be read: 1." in done.out
    drawn = {(point["arm"], point["run"]) for point in read_csv(two_arms / "comparison/curves.csv")}
    assert ("n_layer=8", "runs/n_layer=8,seed=0") in drawn  # but the figure shows how far it came

    remove_metrics(write_run("started", status=None))
    done = llm_train("compare", two_arms, "--unfinished")
    assert done.err.splitlines()[1:] == ["left out runs/started: unfinished, it has logged nothing"]
    assert "| 8 | 1 |  | 70.00 | 70.00 |" in (two_arms / "comparison/table.md").read_text()


def damage_config(run: Path) -> None:
    (run / "config.yaml").write_text("model: [")


def remove_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def empty_config(run: Path) -> None:
    (run / "config.yaml").write_text("")


def remove_metrics(run: Path) -> None:
    (run / "metrics.csv").unlink()


def damage_metrics(run: Path) -> None:
    (run / "metrics.csv").write_text("step,epoch,val/loss\n10,0,1.0\n20,0\n")


def misspell_metrics(run: Path) -> None:
    (run / "metrics.csv").write_text("step,epoch,val/loss\n10,0,one\n")


def step_less_metrics(run: Path) -> None:
    (run / "metrics.csv").write_text("epoch,val/loss\n0,1.0\n")


def binary_metrics(run: Path) -> None:
    (run / "metrics.csv").write_bytes(b"\xff\xfe\x00")


def halve_summary(run: Path) -> None:
    (run / "summary.json").write_text('{"status": "fin')


def halve_environment(run: Path) -> None:
    (run / "environment.json").write_text('[{"commit": "a')


def list_summary(run: Path) -> None:
    (run / "summary.json").write_text("[1]")


def nest_summary(run: Path) -> None:
    (run / "summary.json").write_text("[" * 100_000)


def nest_config(run: Path) -> None:
    (run / "config.yaml").write_text("a: " + "[" * 100_000)  # PyYAML 6.0.4 has a limit of its own


def empty_header(run: Path) -> None:
    (run / "metrics.csv").write_text("\n")


def no_values_of_a_change(run: Path) -> None:
    (run / "environment.json").write_text('[{"resumed": {"changed": {"optimizer.lr": []}}}]')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_config, "runs/bad/config.yaml, line 2: "),
        (remove_config, "config.yaml is missing"),
        (empty_config, "config.yaml holds no settings"),
        (remove_metrics, "it has finished, and metrics.csv is missing or empty"),
        (damage_metrics, "metrics.csv, line 3: 2 values for 3 columns"),
        (misspell_metrics, "metrics.csv, column val/loss: could not convert string to float: 'one'"),
        (step_less_metrics, "metrics.csv: its first column is 'epoch' and not 'step'"),
        (binary_metrics, "can't decode byte"),
        (halve_summary, "summary.json is damaged ("),
        (list_summary, "summary.json is damaged (it holds no dict)"),
        (halve_environment, "environment.json is damaged ("),
        (nest_summary, "summary.json is damaged ("),
        (nest_config, "runs/bad/config.yaml, line 1: "),
        (empty_header, "its files have not the form of a run's (IndexError"),
        (no_values_of_a_change, "its files have not the form of a run's (KeyError"),
    ],
)
def test_a_damaged_run_cannot_be_read(write_run, damage, reason):
    run = write_run("bad", seed=9)
    damage(run)
    with pytest.raises(UserError) as caught:
        read_folder(run.relative_to(Path.cwd()))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_half_written_last_line_is_not_read(write_run):
    run = write_run("killed", (3.0, 2.0), status=None)
    with (run / "metrics.csv").open("a") as file:
        file.write("30,0,1.")
    assert [column.tolist() for column in read_folder(run).metrics["val/loss"]] == [[10, 20], [3.0, 2.0]]


def test_of_rows_of_one_step_the_last_is_taken(write_run):
    run = write_run("resumed", (3.0, 2.0))
    with (run / "metrics.csv").open("a") as file:
        file.write("20,0,1.0\n")
    assert [column.tolist() for column in read_folder(run).metrics["val/loss"]] == [[10, 20], [3.0, 1.0]]


def test_runs_are_found_at_any_depth_and_only_once(write_run):
    run = write_run("study/arm,seed=0")
    shutil.copytree(run, "runs/other/deep/run")
    (run / "wandb/files").mkdir(parents=True)
    (run / "wandb/files/config.yaml").write_text("not: a run")
    Path("runs/link").symlink_to(run.parent)
    assert len(find_runs([run, Path("runs"), Path("runs/study")])) == 2


@pytest.mark.usefixtures("empty_images")
def test_metrics_are_what_the_runs_monitor_and_what_they_have_in_common(llm_train, write_run):
    columns = {"train/loss": [1, 2], "val/size": [1, 2], "val/bad/far": [1, 2], "val/accuracy": [0.5, 0.4]}
    for name, more in (("one", {}), ("two", {"val/other": [1, 2]})):
        write_run(name, columns=columns | more, monitor=("val/accuracy", "max"))
    runs = [read_folder(Path("runs", name)) for name in ("one", "two")]
    assert choose_metrics(runs, []) == (["val/accuracy", "val/size"], [])
    done = llm_train("compare", "runs", "--metrics", "val/other", "train/loss", "--maximize", "val/other")
    first, _, row, *_ = Path("runs/comparison/table.md").read_text().splitlines()
    assert first == "| n | val/other, best = last | train/loss, best | train/loss, last |"
    assert row == "| 2 | 2.000 (n = 1) | 1.000 | 2.000 |"
    assert "Several runs have the same seed in all runs. They are not independent" in done.out


@pytest.mark.usefixtures("empty_images")
def test_arms_of_equal_seeds_are_told_apart(llm_train, write_run):
    for depth in (1, 2):
        for number in (1, 2):
            write_run(f"{depth}.{number}", model__init_args__n_layer=depth, optimizer__init_args__lr=depth / 10)
    done = llm_train("compare", "runs")
    assert "Several runs have the same seed in n_layer=1, lr=0.1; n_layer=2, lr=0.2. " in done.out


def resume(run: Path, *sessions: tuple[int, dict[str, list]]) -> None:
    """Record sessions after the first of a run: the step each resumed from, and the settings that it changed."""
    resumed = [{"resumed": {"checkpoint": "last.ckpt", "step": step, "changed": changed}} for step, changed in sessions]
    (run / "environment.json").write_text(json.dumps([{}, *resumed]))


@pytest.mark.usefixtures("empty_images")
def test_a_run_that_was_resumed_with_another_setting_is_in_an_arm_of_its_own(llm_train, write_run):
    for seed in (0, 1):
        write_run(f"high{seed}", seed=seed, optimizer__init_args__lr=3e-3)
        write_run(f"low{seed}", seed=seed, optimizer__init_args__lr=1e-3)
    killed = write_run("killed", seed=2, optimizer__init_args__lr=1e-3, trainer__max_steps=20)
    resume(killed, (60, {"optimizer.lr": [3e-3, 1e-3], "trainer.max_steps": [60, 20]}))
    done = llm_train("compare", "runs")
    note = (
        "Runs that were resumed with other settings are arms of their own: "
        "runs/killed (optimizer.lr 0.003 until step 60 then 0.001)."
    )
    assert note in done.out.splitlines()
    assert note in Path("runs/comparison/index.html").read_text()
    rows = Path("runs/comparison/table.md").read_text().splitlines()[2:5]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| 0.001", "2"],
        ["| 0.003", "2"],
        ["| 0.003 until step 60 then 0.001", "1"],
    ]


@pytest.mark.parametrize(
    ("sessions", "values"),
    [
        ([(6, {"optimizer.lr": [3, 2]}), (9, {}), (12, {"optimizer.lr": [2, 1]})], "3 until step 6 then 2 until step "
         "12 then 1"),
        ([(6, {"optimizer.lr": [3, 2]}), (6, {})], "3 until step 6 then 2"),
        ([(6, {"optimizer.lr": [3, 2]}), (4, {})], "3 until step 4 then 2"),  # from best.ckpt, as last.ckpt was damaged
        ([(6, {"optimizer.lr": [3, 2]}), (6, {"optimizer.lr": [2, 3]})], None),  # nothing was kept of the second
        ([(0, {"optimizer.lr": [3, 2]})], None),
        ([(6, {"optimizer": ["a.b.C", "torch.optim.SGD"]})], "C until step 6 then SGD"),
        ([(6, {"data.num_workers": [0, 2], "trainer.devices": [1, 2], "model.compile": [False, True]})], None),
        ([(6, {"trainer.enable_progress_bar": [True, False], "trainer.log_every_n_steps": [20, 5]})], None),
        ([(6, {"model.block.dropout": [0.0, 0.1]})], "0.0 until step 6 then 0.1"),
    ],
)  # fmt: skip
def test_the_values_of_a_resumed_run_in_turn(write_run, sessions, values):
    run = write_run("one")
    resume(run, *sessions)
    assert list(read_folder(run).resumed.values()) == ([values] if values else [])


@pytest.mark.parametrize(
    ("schedule", "warmup", "has_effect"), [("Constant", 0, False), ("Constant", 0.1, True), ("Cosine", 0, True)]
)
def test_another_length_makes_another_run_where_the_schedule_depends_on_it(write_run, schedule, warmup, has_effect):
    schedule = {"class_path": f"lightning_modules.optim.schedules.{schedule}", "init_args": {"warmup": warmup}}
    run = write_run("one", lr_scheduler=schedule)
    resume(run, (60, {"trainer.max_steps": [60, 120]}))
    assert bool(read_folder(run).resumed) == has_effect


@pytest.mark.usefixtures("empty_images")
def test_an_evaluation_of_untrained_weights_is_no_run_to_compare(llm_train, write_run):
    write_run("one")
    evaluated, damaged = write_run("one.2"), write_run("two")
    for run in (evaluated, damaged):
        (run / "config.yaml").rename(run / "config_validate.yaml")
        (run / "environment.json").touch()
    (evaluated / "metrics.csv").unlink()
    done = llm_train("compare", "runs")
    assert (done.code, done.err) == (0, f"skipped runs/{damaged.name}: config.yaml is missing\n")
    assert "Skipped, since they cannot be read: 1." in done.out
    assert "there are no runs in runs/one.2" in llm_train("compare", "runs/one.2").err


def test_a_table_has_four_metrics_unless_more_are_asked_for(write_run):
    run = read_folder(write_run("one", columns={f"val/{letter}": [1.0] for letter in "abcdef"}))
    shown, more = choose_metrics([run], [])
    assert (shown, more) == ([f"val/{letter}" for letter in "abcd"], ["val/e", "val/f"])
    assert command._notes(arms_of([run]), 0, more)[-1] == "Shown only by --metrics: val/e, val/f."


def test_the_measures_of_a_metric_are_its_best_and_its_last_value():
    run = run_with(loss=10.0)  # after 9.0
    assert [measure.kind for measure in measures_of("val/loss", "min", [run])] == ["best", "last"]
    assert [measure.kind for measure in measures_of("val/loss", "max", [run])] == ["best = last"]
    runs = [run, run_with(loss=11.0)]  # the best of both is 9.0
    assert [measure.kind for measure in measures_of("val/loss", "min", runs)] == ["last"]
    assert [measure.kind for measure in measures_of("val/loss", None, [run])] == ["last"]


@pytest.mark.usefixtures("empty_images")
def test_runs_of_different_lengths_are_compared_with_a_remark(llm_train, write_run):
    for seed in (0, 1):
        write_run(f"long{seed}", (4.0, 3.0, 2.0, 1.0 + seed / 10), seed, optimizer__init_args__lr=0.3)
        write_run(f"short{seed}", (4.0, 3.0 + seed / 10), seed)
    done = llm_train("compare", "runs")
    assert "lr   n  val/loss, best  val/loss, last\n" in done.out
    rows = [row for row in Path("runs/comparison/table.md").read_text().splitlines() if row.startswith("| lr=0.3 ")]
    assert [row.split(" | ")[-3:] for row in rows] == [
        ["–", "–", "none: unequal numbers of validations |"],
        ["-2.00 ± 0.30", "better", "Welch, 2 and 2 runs |"],
    ]
    assert "The last values are of different steps, from 20 (lr=0.1) to 40 (lr=0.3)." in done.out.splitlines()


@pytest.mark.parametrize(("mode", "ranking"), [("min", [2, 0, 3, 1]), ("max", [3, 0, 2, 1])])
def test_arms_are_ranked_by_their_means_and_those_without_one_are_last(mode, ranking):
    arms = arms_of([run_with(loss=loss, width=width) for width, loss in enumerate([2.0, math.nan, 1.0, 3.0])])
    assert command._rank(arms, Measure("val/loss", "last", mode)) == ranking


def test_the_terminal_shows_the_best_thirty_of_many_arms():
    table = tables.Table(["width", "loss"], [[str(number), ""] for number in range(40)])
    shown = command._best_rows(table, range(39, -1, -1))
    assert shown.rows == [*([str(number), ""] for number in range(39, 9, -1)), ["… 10 more arms", ""]]


def test_the_result_of_a_test_is_a_metric_without_a_curve(write_run):
    runs = []
    for seed in (0, 1):
        run = write_run(f"seed={seed}", seed=seed)
        summary = {"status": "finished", "metrics": {"test/accuracy": 0.5 + seed}}
        (run / "summary_test.json").write_text(json.dumps(summary))
        runs.append(read_folder(run))
    assert [run.metrics["test/accuracy"].values.tolist() for run in runs] == [[0.5], [1.5]]
    assert {curve.metric for curve in figures.curves_of(list(runs[0].metrics), arms_of(runs))} == {"val/loss"}
    (run / "summary_test.json").write_text(json.dumps({**summary, "status": "stopped"}))
    assert list(read_folder(run).metrics) == ["val/loss"]  # not the metrics of a part of the test data


@pytest.mark.usefixtures("empty_images")
def test_a_metric_without_a_curve_leaves_no_old_figure(llm_train, write_run):
    run = write_run("one")
    Path("runs/comparison").mkdir()
    Path("runs/comparison/curves.png").touch()
    (run / "metrics.csv").write_text("step,epoch,val/loss\n10,0,1.0\n")
    llm_train("compare", "runs")
    assert not Path("runs/comparison/curves.png").exists()


def test_arms_are_compared_with_a_baseline_under_the_same_other_settings():
    runs = [
        run_with(loss=width / 8 + (0.0 if scale else 0.5), model__width=width, model__scale=scale)
        for width in (8, 16)
        for scale in (True, False)
    ]
    pairs = compared(arms_of(runs), ["model.scale=true"])  # the whole name of the setting `scale`
    assert tables.differences_of(pairs, [Measure("val/loss", "last", "min")]).rows == [
        [f"width={width}, scale=false", f"width={width}, scale=true", "val/loss, last", "+0.5000", "–",
         "none: a single run in an arm"]
        for width in (8, 16)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("depth=2", "--baseline depth: the runs differ in n_layer"),
        ("n_layer=7", "there is no other run to compare; the values are n_layer=2, n_layer=4"),
    ],
)
def test_a_baseline_that_no_run_has(baseline, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compared(arms_of([run_with(n_layer=2), run_with(n_layer=4)]), [baseline])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("val/lose", "--metrics val/lose: no run has logged it (did you mean 'val/loss'?)"),
        ("x", "--metrics x: no run has logged it (there are val/loss)"),
    ],
)
def test_a_metric_that_no_run_has(asked, message):
    with pytest.raises(UserError, match=re.escape(message)):
        choose_metrics([run_with()], [asked])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: there is no such folder"),
        (["empty"], "there are no runs in empty"),
        (["runs/one/config.yaml"], "runs/one/config.yaml: is a file; give the folder of its run, runs/one"),
        (["runs", "--maximize", "val/lose"], "val/lose is not compared; there is val/loss"),
        (["--wandb", "project"], "--wandb project: give ENTITY/PROJECT or ENTITY/PROJECT/GROUP"),
        (["runs", "--out", "file"], "file"),
    ],
)
def test_a_mistake_costs_one_line(llm_train, write_run, arguments, message):
    write_run("one")
    Path("empty").mkdir()
    Path("file").touch()
    done = llm_train("compare", *arguments)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not Path("runs/comparison").exists()


def test_runs_without_a_common_metric(write_run):
    one = read_folder(write_run("one", columns={"val/loss": [1.0]}))
    two = read_folder(write_run("two", columns={"val/bytes_per_token": [1.0]}))
    with pytest.raises(UserError) as caught:
        choose_metrics([one, two], [])
    assert str(caught.value) == (
        f"these 2 runs have no metric in common: {one.name} has val/loss, {two.name} has val/bytes_per_token"
    )
    only_training = read_folder(write_run("three", columns={"train/loss": [1.0]}))
    with pytest.raises(UserError, match="choose with --metrics from train/loss"):
        choose_metrics([only_training], [])


def test_no_run_that_counts(llm_train, write_run):
    run = write_run("one", status=None)
    done = llm_train("compare", "runs")
    assert done.err.splitlines()[1:] == [
        "error: none of these runs has finished (1 unfinished); --unfinished counts them all"
    ]
    empty_config(run)
    assert "error: none of the 1 runs in runs can be read" in llm_train("compare", "runs").err


def test_either_folders_or_wandb(llm_train):
    assert llm_train("compare").code == 2
    assert "give either run folders or --wandb" in llm_train("compare", "runs", "--wandb", "a/b").err


def test_a_failure_leaves_the_earlier_comparison(llm_train, two_arms, comparison, monkeypatch):
    shutil.copytree(comparison.folder, two_arms / "comparison")
    before = {file.name: file.read_bytes() for file in (two_arms / "comparison").iterdir()}

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", full)
    failed = llm_train("compare", two_arms, "--maximize", "val/loss")
    assert (failed.code, failed.err) == (1, "error: the disk is full\n")
    assert {file.name: file.read_bytes() for file in (two_arms / "comparison").iterdir()} == before


# --- figures ---


def points_of(axes: Axes) -> list[list[tuple[float, float]]]:
    return [list(map(tuple, line.get_xydata())) for line in axes.get_lines() if line.get_linestyle() != "None"]


def test_results_are_drawn_over_a_setting_that_is_a_number():
    runs = [
        run_with(seed, loss=width * (1 + scale) + seed, width=width, scale=scale)
        for width in (1, 10, 100)
        for scale in (True, False)
        for seed in (0, 2)
    ]
    picture = figures.draw_summary(arms_of(runs), [Measure("val/loss", "last", "min")], range(6))
    (axes,) = picture.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("width", "val/loss, last", "log")
    means = {tuple(line) for line in map(tuple, points_of(axes)) if len(line) == 3}
    assert means == {((1, 2), (10, 11), (100, 101)), ((1, 3), (10, 21), (100, 201))}
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == ["scale=false", "scale=true"]


def test_other_arms_are_drawn_in_rows():
    runs = [run_with(0, loss=loss, init=name) for name, loss in (("xavier", 2.0), ("gpt2", 1.0))]
    picture = figures.draw_summary(arms_of(runs), [Measure("val/loss", "last", "min")], [0, 1])
    (axes,) = picture.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["gpt2", "xavier"]
    assert axes.get_ylabel() == "init"
    assert axes.get_xlabel() == "val/loss, last"
    assert len({line.get_color() for line in axes.get_lines()}) == 1


def test_in_rows_the_baseline_is_marked():
    runs = [run_with(0, loss=loss, init=name) for loss, name in ((2.0, "gpt2"), (1.0, "he"), (3.0, "xavier"))]
    arms = arms_of(runs)
    (axes,) = figures.draw_summary(arms, [Measure("val/loss", "last", "min")], range(3), [arms[0], arms[0]]).axes
    (line,) = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert list(line.get_xdata()) == [2.0, 2.0]
    first, *others = [line.get_color() for line in axes.get_lines() if line.get_marker() == "o"]
    assert first == line.get_color()
    assert len(set(others)) == 1
    assert first not in others


def test_no_line_is_drawn_over_settings_that_change_together():
    arms = arms_of([run_with(width=width, depth=width) for width in (1, 2, 3)])
    assert figures._numeric_setting(arms) is None
    assert figures._numeric_setting(arms_of([run_with(width=width) for width in (1, 2, 3)])) == "width"
    assert figures._numeric_setting(arms_of([run_with(flag=flag) for flag in (True, False)])) is None


def test_of_many_arms_the_best_are_coloured():
    arms = arms_of([run_with(0, loss=1 + number, name=f"arm{number:02}") for number in range(60)])
    curves = figures.curves_of(["val/loss"], arms)
    picture = figures.draw_curves(curves, arms, ranking=range(60))
    (legend,) = picture.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [*(f"arm0{number}" for number in range(7)), "other arms"]
    assert legend.get_title().get_text() == "name"
    assert len(picture.axes[0].get_lines()) == 60
    picture = figures.draw_summary(arms, [Measure("val/loss", "last", "min")], ranking=range(60))
    assert len(picture.axes[0].get_yticklabels()) == 30


def test_fourteen_lines_can_be_told_apart():
    looks = figures._all_looks()
    assert len({(look["color"], look["linestyle"]) for look in looks}) == len(looks) == 14


def test_an_axis_fits_the_curves_and_not_a_wide_band():
    runs = [run_with(seed, loss=8.0 + seed) for seed in range(3)]
    arms = arms_of(runs)
    (curve,) = figures.curves_of(["val/loss"], arms)
    assert (curve.values.tolist(), len(curve.steps)) == ([9.0, 9.0], 2)
    runs[0].metrics["val/loss"].values[1] = 1000.0
    (axes,) = figures.draw_curves(figures.curves_of(["val/loss"], arms), arms, [0]).axes
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert 1 < low < 8
    assert 1000 < high < 3000  # each run is drawn


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    series = Series(np.arange(5_000), np.arange(5_000.0))
    runs = [RunResult(str(seed), "finished", "", {}, {"seed": seed}, {}, {"val/loss": series}) for seed in range(3)]
    (curve,) = figures.curves_of(["val/loss"], arms_of(runs))
    assert (len(curve.steps), curve.steps[0], curve.steps[-1], curve.values[-1]) == (300, 0, 4_999, 4_999.0)


# --- W&B, start-up ---


class FakeRun(SimpleNamespace):
    def scan_history(self):
        yield {"_step": 0, "trainer/global_step": 10, "train/loss": 5.0, "epoch": 0}
        yield {"_step": 1, "trainer/global_step": 20, "val/loss": 7.0, "figures/curve": {"_type": "image"}}
        yield {"_step": 2, "trainer/global_step": 10, "val/loss": "NaN"}
        yield {"_step": 3, "trainer/global_step": 20, "val/loss": self.loss}  # again, by the resumed run
        yield {"_step": 4, "_runtime": 3.0}


@pytest.fixture
def fake_wandb(monkeypatch):
    """W&B's public API with four training runs of a group, one that still runs, and one that is a test."""
    asked = {}

    class Api:
        def runs(self, path, filters, lazy):
            asked.update(path=path, filters=filters)
            for number in range(6):
                config = {
                    "seed_everything": number // 2,
                    "model": {"class_path": "a.b.C", "init_args": {"dropout": number % 2 / 10}},
                    "run": {"name": f"run{number}"},
                    "environment": {"commit": str(number)},
                }
                yield FakeRun(
                    id=f"id{number}", name=f"run{number}", config=config, loss=1.0 + number,
                    state="running" if number == 4 else "finished", job_type="test" if number == 5 else "fit",
                )  # fmt: skip

    monkeypatch.setattr(wandb, "Api", Api)
    return asked


@pytest.mark.usefixtures("empty_images")
def test_runs_are_read_from_wandb(llm_train, fake_wandb):
    done = llm_train("compare", "--wandb", "me/project/group/of", "--out", "out")
    assert done.err == "left out me/project/id4 (run4): unfinished\n"
    assert fake_wandb == {"path": "me/project", "filters": {"group": "group/of"}}
    rows = read_csv(Path("out/runs.csv"))
    assert [(row["dropout"], row["seed"], row["val/loss, best = last"]) for row in rows] == [
        ("0", "0", "1"), ("0", "1", "3"), ("0", "2", "5"), ("0.1", "0", "2"), ("0.1", "1", "4"),
    ]  # fmt: skip
    assert "| 0.1 | 2 |  | 3 ± 13 |" in Path("out/table.md").read_text()
    assert "+1.0 ± 6.1" in done.out


@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.UsageError("No API key configured."),
        ValueError("Could not find project x"),
        wandb.errors.CommError("404"),
    ],
)
def test_an_error_of_wandb_is_a_users_error(monkeypatch, error):
    class Api:
        def runs(self, *_, **__):
            raise error

    monkeypatch.setattr(wandb, "Api", Api)
    with pytest.raises(UserError) as caught:
        read_wandb("me/x")
    assert str(caught.value) == f"--wandb me/x: {error}"


def test_a_run_of_wandb_that_was_resumed_with_another_setting(monkeypatch):
    resumed = {"checkpoint": "last.ckpt", "step": 60, "changed": {"lr": [0.003, 0.001]}}
    config = {"lr": 0.001, "environment": {"resumed": resumed}}
    run = FakeRun(id="id", name="run", config=config, loss=1.0, state="finished", job_type="fit")
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda *_, **__: [run]))
    assert read_wandb("me/x")[0].settings == {"lr": "0.003 until step 60 then 0.001"}


def test_wandb_without_runs(monkeypatch):
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda *_, **__: []))
    with pytest.raises(UserError, match="--wandb me/x: there are no training runs"):
        read_wandb("me/x")


def test_the_command_starts_without_torch():
    modules = "import sys, experiments.comparison.command; print(*{name.split('.')[0] for name in sys.modules})"
    root = Path(__file__).parents[2]
    loaded = subprocess.run([sys.executable, "-c", modules], cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "wandb", "pandas", "matplotlib"} & set(loaded.stdout.split())
