"""`llm-train study`: the sweep files that it accepts, the runs that it starts, and how it resumes after a kill."""

import csv
import errno
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from subprocess import Popen

import forks
import pytest
import yaml
from helpers import LAST, RUNS, TINY
from stub_runs import GRID, STUDY, assert_wandb_is_its_own, given, trials

from experiments.errors import UserError
from experiments.study import launchers
from experiments.study.distributions import Distribution
from experiments.study.journal import Journal, goal_of, settings_of
from experiments.study.names import arm_name, folder_name
from experiments.study.runs import Attempt, Plan, study_folder
from experiments.study.sweep_file import read_sweep_file

# The file


ACCEPTED = {
    "one value": {"values": [1]},
    "null and true": {"values": [None, True, "a", [1, 2]]},
    "shares": {"values": [1, 2], "probabilities": [0.25, 0.75]},
    "whole numbers": {"min": 1, "max": 4},
    "numbers": {"min": 1, "max": 2.5},
    "named": {"distribution": "uniform", "min": 1, "max": 4},
    "logarithmic": {"distribution": "q_log_uniform_values", "min": 1e-5, "max": 1, "q": 1e-5},
    "bell with defaults": {"distribution": "normal"},
    "nested": {"parameters": {"lr": {"value": 0.1}, "betas": {"parameters": {"first": {"min": 0.1, "max": 0.9}}}}},
}


@pytest.mark.parametrize("spec", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_a_parameter_that_wandb_accepts_is_accepted(sweep, spec):
    assert read_sweep_file(sweep(method="random", run_cap=1, parameters={"optimizer": spec})).parameters


def test_all_keys_of_a_sweep_file_are_accepted(sweep):
    read = read_sweep_file(
        sweep(
            name="a study: of rates",
            description="text",
            method="bayes",
            metric={"name": "val/loss", "goal": "maximize", "target": 3, "impute": "best"},
            early_terminate={"type": "hyperband", "max_iter": 27, "s": 2, "eta": 3, "strict": True},
            kind="sweep",
            controller={"type": "cloud"},
            project="p",
            entity="e",
            run_cap=3,
        )
    )
    assert (read.method, read.metric.name, read.maximize) == ("bayes", "val/loss", True)
    assert study_folder(read, [], None) == Path("runs/toy/a-study-of-rates")
    assert read.early_terminate.first == 3


@pytest.mark.parametrize("words", [["-c", "{}"], ["-c{}"], ["--config={}"]])
def test_a_study_lies_in_the_folder_of_the_topic_that_its_command_trains(sweep, words):
    command = ["srun", "-c", "4", "-n1", "llm-train", "fit", *(word.format(TINY) for word in words), "${args}"]
    assert study_folder(read_sweep_file(sweep(command=command)), [], None) == RUNS / "sweep"


WRONG = {
    "unknown key": ({"metod": "grid"}, "line 22: metod: there is no such key (did you mean 'method'?)"),
    "no method": ({"method": None}, "sweep.yaml: method: is missing"),
    "unknown method": (
        {"method": "gird"},
        "line 1: method: must be 'grid', 'random' or 'bayes', got \"gird\" (did you mean 'grid'?)",
    ),
    "custom method": ({"method": "custom"}, 'got "custom" (custom runs on W&B\'s servers only)'),
    "for Launch": ({"job": "j"}, "job: is for W&B's own servers"),
    "no parameters": ({"parameters": None}, "sweep.yaml: parameters: is missing"),
    "parameters empty": ({"parameters": {}}, "parameters: is empty: there is nothing to sweep"),
    "empty grid": ({"parameters": {"lr": {"values": []}}}, "line 7: parameters.lr.values: is empty"),
    "no value": ({"parameters": {"lr": {}}}, "parameters.lr: must have `value:`, `values:`, or `min:` and `max:`"),
    "unknown key of a parameter": ({"parameters": {"lr": {"value_s": [1]}}}, "(did you mean 'values'?)"),
    "key too many": ({"parameters": {"lr": {"values": [1], "q": 2}}}, "parameters.lr.q: there is no such key"),
    "bad name": ({"parameters": {"lr rate": {"value": 1}}}, "line 6: parameters.lr rate: is not a name of a parameter"),
    "unknown distribution": (
        {"parameters": {"lr": {"distribution": "log_unifrm_values", "min": 1, "max": 2}}},
        "line 7: parameters.lr.distribution: there is no 'log_unifrm_values' (did you mean 'log_uniform_values'?)",
    ),
    "withdrawn distribution": (
        {"parameters": {"lr": {"distribution": "log_uniform", "min": -3, "max": -1}}},
        "did you mean 'log_uniform_values'?",
    ),
    "text for a number": (
        {"method": "random", "parameters": {"lr": {"min": "1e-5", "max": 0.1, "distribution": "uniform"}}},
        'lr.min: must be a valid number, got "1e-5" (YAML wants 1.0e-5)',
    ),
    "max missing": ({"parameters": {"lr": {"distribution": "int_uniform", "min": 1}}}, "int_uniform needs max:"),
    "min above max": ({"parameters": {"lr": {"min": 2, "max": 1}}}, "parameters.lr: min 2 must be less than max 1"),
    "logarithm of nothing": (
        {"method": "random", "parameters": {"lr": {"distribution": "log_uniform_values", "min": 0, "max": 1}}},
        "lr.min: must be greater than 0",
    ),
    "shares": ({"parameters": {"lr": {"values": [1, 2], "probabilities": [0.5, 0.6]}}}, "must add up to 1, got 1.1"),
    "grid without end": (
        {"parameters": {"lr": {"min": 0.1, "max": 1.0}}},
        "line 6: parameters.lr: a grid cannot enumerate uniform",
    ),
    "goal": ({"metric": {"name": "a", "goal": "minimise"}}, "metric.goal: must be 'minimize' or 'maximize'"),
    "metric without a name": ({"metric": {"goal": "minimize"}}, "line 2: metric.name: is missing"),
    "bayes without a metric": ({"method": "bayes", "metric": None}, "method: bayes needs a metric:"),
    "run_cap": ({"run_cap": 0}, "run_cap: must be greater than 0, got 0"),
    "hyperband": ({"early_terminate": {"type": "hyperband", "s": 2}}, "needs min_iter:, or max_iter: and s:"),
    "stopping rule": ({"early_terminate": {"type": "median"}}, "early_terminate.type: must be 'hyperband', got"),
    "section": ({"metric": "val/loss"}, 'line 2: metric: must be a section, got "val/loss"'),
    "long section": ({"metric": "a" * 99}, 'line 2: metric: must be a section, got "' + "a" * 56 + "..."),
    "parameter": ({"parameters": {"lr": 1}}, "line 6: parameters.lr: must be a section, got 1; write {value: ...}"),
    "list": ({"parameters": {"lr": [1, 2]}}, "parameters.lr: must be a section, got [1, 2]; write {values: [...]}"),
    "null": (
        {"early_terminate": {"type": "hyperband", "min_iter": None}},
        "min_iter: must be a valid integer, got null",
    ),
    "nested": (
        {"parameters": {"a": {"parameters": {"b": {"valu": 1}}}}},
        "line 9: parameters.a.parameters.b.valu: there",
    ),
    "rung": ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "min_iter: must be greater than 0, got 0"),
    "eta": (
        {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2.5}},
        "eta: must be a multiple of 1, got 2.5",
    ),
    "rule without a metric": (
        {"metric": None, "early_terminate": {"type": "hyperband", "min_iter": 1}},
        "line 19: early_terminate: needs a metric:",
    ),
    "unit": (
        {"method": "random", "parameters": {"lr": {"distribution": "q_normal", "q": 0}}},
        "lr.q: must be greater than 0",
    ),
    "sigma": (
        {"method": "random", "parameters": {"lr": {"distribution": "normal", "sigma": -1}}},
        "lr.sigma: must be greater than or",
    ),
    "fraction": (
        {"parameters": {"lr": {"distribution": "int_uniform", "min": 1, "max": 2.5}}},
        "must be whole numbers, got 1 and 2.5",
    ),
    "a share too many": (
        {"parameters": {"lr": {"values": [1], "probabilities": [0.5, 0.5]}}},
        "there are 1 values and 2 prob",
    ),
    "share": (
        {"parameters": {"lr": {"values": [1], "probabilities": [-1]}}},
        "lr.probabilities.0: must be greater than or equal",
    ),
    "weights in a grid": (
        {"parameters": {"lr": {"values": [1, 2], "probabilities": [0.5, 0.5]}}},
        "a grid cannot enumerate categorical_w_probabilities",
    ),
    "unknown macro": ({"command": ["x", "${arg}"]}, "line 18: command.1: there is no ${arg} (did you mean 'args'?)"),
    "no settings": ({"command": ["x"]}, "has no ${args}: the settings would not reach the runs"),
    "no program": ({"command": None}, "runs ${program}, and program: is missing"),
}


@pytest.mark.parametrize(("keys", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_mistake_in_a_sweep_file_is_reported_with_its_place(sweep, keys, message):
    path = sweep(**keys)
    with pytest.raises(UserError) as caught:
        read_sweep_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert message in str(caught.value)


def test_a_mistake_in_a_sweep_file_costs_one_line_and_leaves_no_folder(llm_train, sweep):
    path = sweep(metod="grid")
    done = llm_train("study", path)
    assert done.code == 1
    assert done.err == f"error: {path}, line 22: metod: there is no such key (did you mean 'method'?)\n"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a sweep file"),
        ("- grid\n", "is not a sweep file"),
        ("method: [grid\n", "sweep.yaml, line 2: is not YAML"),
        ("method: grid\nmethod: random\n", "sweep.yaml, line 2: 'method' is there twice, first in line 1"),
        ("name: 2026-01-01\n", "holds a value that a sweep cannot have"),
        (b"name: caf\xe9\n", "is not UTF-8 text (byte 9)"),
    ],
)
def test_a_file_that_is_not_a_sweep_is_reported_in_one_line(tmp_path, text, message):
    path = tmp_path / "sweep.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_sweep_file(path)
    assert message in str(caught.value)


def test_the_command_of_a_run_is_word_for_word_that_of_wandbs_agent(sweep, monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    monkeypatch.setenv("WHERE", "there")
    settings = {"lr": 1e-5, "flag": True, "off": False, "list": [1, "a"], "optimizer": {"lr": 0.1}}
    macros = ["args", "args_no_hyphens", "args_no_equals", "args_no_boolean_flags", "args_json"]
    macros += ["args_append_hydra", "args_override_hydra"]
    command = ["run", 3, "${envvar:WHERE}/x", *(f"${{{macro}}}" for macro in macros)]
    theirs = create_sweep_command_args({"args": {key: {"value": value} for key, value in settings.items()}})
    expected = create_sweep_command([*command])[:3] + [word for macro in macros for word in theirs[macro]]
    ours = read_sweep_file(sweep(command=command)).words(settings, Path("settings.json"))
    assert ours == list(map(str, expected))


def test_null_is_null_for_the_runs_and_not_the_text_none(sweep):
    settings = {"clip": None, "trainer": {"clip": None, "check": False}, "list": [None, "a"]}
    words = read_sweep_file(sweep(command=["run", "${args}", "${args_no_equals}"])).words(settings, Path())
    section, values = '{"clip": null, "check": false}', '[null, "a"]'
    assert words[1:4] == ["--clip=null", f"--trainer={section}", f"--list={values}"]
    assert words[4:] == ["--clip", "null", "--trainer", section, "--list", values]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("学習率", "学習率"),
        ("Étude № 1", "Étude-1"),
        ("E\N{COMBINING ACUTE ACCENT}tude", "Étude"),
        ("../a b/", "a-b"),
        ("№", "name-a01afe1c"),
        ("", "name-e3b0c442"),
    ],
)
def test_a_study_has_a_folder_of_its_own_whatever_its_name(text, name):
    assert folder_name(text) == name
    assert len(folder_name(text * 200).encode()) <= 100


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"a": "größer", "b": ["\u5b66", None], "c": "★"}, "a=größer,b=学-null,c=none"),
        ({"model.initialization": "xavier", "seed_everything": 2}, "initialization=xavier,seed=2"),
        ({"model.dropout": 0.1, "model.attention.dropout": 0.25}, "model.dropout=0.1,attention.dropout=0.25"),
        ({"optimizer": "torch.optim.SGD", "optimizer.lr": 1e-05}, "optimizer=SGD,lr=1e-05"),
        ({"optimizer": {"lr": 0.30000000000000004}}, "lr=0.3"),
        ({"data.tokenizer": "runs/words/offline/tokenizer"}, "tokenizer=runs-words-offline-tokenizer"),
        ({"config": "experiments/topic/rows/first.yaml", "without": []}, "config=first,without=none"),
        ({"a": "my.txt", "b": "../y/my.txt", "c": "my.Own", "d": "my._Own"}, "a=my.txt,b=y-my.txt,c=Own,d=_Own"),
        ({"a": None, "b": True, "c": -1, "d": [1, 2], "e": 1e20}, "a=null,b=true,c=-1,d=1-2,e=1e20"),
    ],
)
def test_the_name_of_an_arm_lists_its_settings(settings, name):
    assert arm_name(settings) == name


def test_long_names_are_shortened_and_stay_different():
    names = {arm_name({f"model.setting_{i}": "x" * 20 for i in range(9)} | {"last": last}) for last in range(3)}
    assert len(names) == 3
    assert all(len(name) == 100 for name in names)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ({"min": 2, "max": 4}, [2, 3, 4]),
        ({"distribution": "q_uniform", "min": 0.1, "max": 1, "q": 0.3}, [0.1, 0.4, 0.7]),  # without max
        ({"values": ["a", 1, "a"]}, ["a", 1]),
    ],
)
def test_a_grid_has_the_values_of_wandbs_grid(sweep, spec, values):
    assert read_sweep_file(sweep(parameters={"x": spec})).distributions["x",].grid() == values


@pytest.mark.parametrize(
    ("distribution", "spec", "drawn", "value"),
    [
        ("categorical", {"values": ["a", None]}, "null", None),
        ("categorical_w_probabilities", {"values": ["a", "b"], "probabilities": [0.3, 0.7]}, 0.29, "a"),
        ("categorical_w_probabilities", {"values": ["a", "b"], "probabilities": [0.3, 0.7]}, 0.31, "b"),
        ("normal", {"mu": 2, "sigma": 3}, 0.8413447, pytest.approx(5)),
        ("log_normal", {"mu": 0, "sigma": 1}, 0.5, pytest.approx(1)),
        ("beta", {"a": 1, "b": 2}, 0.75, pytest.approx(0.5)),
        ("q_normal", {"mu": 0, "sigma": 10, "q": 4}, 0.8413447, 8),
        ("q_uniform", {"min": 0, "max": 1, "q": 0.1}, 0.33, 0.3),
        ("q_log_uniform_values", {"min": 1, "max": 1000, "q": 32}, 100.0, 96),
    ],
)
def test_a_draw_becomes_the_value_of_its_distribution(distribution, spec, drawn, value):
    found = Distribution(distribution=distribution, **spec).setting(drawn)
    assert found == value
    assert isinstance(found, int) == isinstance(spec.get("q"), int)


# The runs


def test_a_grid_runs_in_the_order_of_the_file_and_a_failure_stops_no_other_run(llm_train, sweep):
    path = sweep(parameters=GRID | {"end": {"values": ["well", "fails"]}, "seed_everything": {"value": 1}})
    done = llm_train("study", path, "--extra=1")
    assert done.code == 1
    assert [line.split("  (")[0] for line in done.err.splitlines() if line.startswith("[")] == [
        "[1/4] lr=0.3,end=well  val/loss 0.1500",
        "[2/4] lr=0.3,end=fails  failed: it was told to fail",
        "[3/4] lr=0.1,end=well  val/loss 0.0500",
        "[4/4] lr=0.1,end=fails  failed: it was told to fail",
    ]
    assert f"again   llm-train study {path} --extra=1\nnext    llm-train compare {STUDY}\n" in done.err
    assert "hello" in (STUDY / "logs/lr=0.3,end=well.log").read_text()
    assert given("lr=0.1,end=well")["extra"] == "1"
    assert [(trial.state.name, trial.value, trial.user_attrs.get("error")) for trial in trials()[:2]] == [
        ("COMPLETE", 0.15, None),
        ("FAIL", None, "it was told to fail"),
    ]

    (STUDY / "lr=0.3,end=well/given.json").unlink()
    again = llm_train("study", path, "--extra=1")  # tries those that failed, and no other
    assert not (STUDY / "lr=0.3,end=well/given.json").exists()
    assert "4 runs, 2 of them done" in again.err
    assert [line[:5] for line in again.err.splitlines() if line.startswith("[")] == ["[3/4]", "[4/4]"]

    Path("precious").mkdir()  # the folder of a run that has nothing to resume from is removed
    journal = STUDY / "journal.log"
    journal.write_text(journal.read_text().replace("lr=0.3,end=fails", "../../../precious"))
    hostile = llm_train("study", path, "--extra=1")
    assert (hostile.code, "'../../../precious' is not a name of a run" in hostile.err) == (1, True)
    assert Path("precious").is_dir()


@pytest.mark.parametrize(("refused", "n_started", "n_done"), [(0.3, 1, 0), (0.1, 4, 2)])
def test_a_study_whose_first_run_is_refused_starts_no_other(llm_train, sweep, refused, n_started, n_done):
    program = f"import runpy, sys; '--lr={refused}' in sys.argv and sys.exit(2); runpy.run_path('stub.py')"
    command = ["${interpreter}", "-c", program, "fit", "--run.topic=toy", "${args}"]
    done = llm_train("study", sweep(command=command))
    assert done.code == 1
    assert len([line for line in done.err.splitlines() if line.startswith("[")]) == n_started
    assert f"({n_done} of 4 runs done, {n_started - n_done} failed)" in done.err
    assert ("no further run starts" in done.err) == (n_done == 0)
    assert ("next  " in done.err) == (n_done > 0)
    assert "again  " not in done.err  # which could only be refused again
    again = llm_train("study", sweep(command=command))  # only the runs of one value are refused
    assert (again.code, "(2 of 4 runs done, 2 failed)" in again.err) == (1, True), again.err


def test_jobs_run_at_the_same_time_and_share_the_cores(llm_train, sweep, monkeypatch, in_a_run_of_wandb):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    os.mkfifo("pipe")
    done = llm_train("study", sweep(project="theirs"), "--jobs", "2", "--runs", "2", "--act=meet")
    assert done.code == 0, done.err
    for arm in ("lr=0.3,seed=1", "lr=0.3,seed=2"):
        assert given(arm)["environment"]["OMP_NUM_THREADS"] == "3"
        assert_wandb_is_its_own(arm)


RANDOM = {
    "method": "random",
    "parameters": {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}, "n": {"min": 1, "max": 9}},
}


def test_random_draws_depend_on_the_seed_and_not_on_interruptions(llm_train, sweep):
    path = sweep(**RANDOM)
    plan = llm_train("study", path, "--runs=4", "--dry_run").out.splitlines()
    assert plan != llm_train("study", path, "--runs=4", "--dry_run", "--seed=1").out.splitlines()
    assert not Path("runs").exists()
    for n_runs in ("1", "4"):
        assert llm_train("study", path, "--runs", n_runs).code == 0
    other = llm_train("study", path, "--runs=4", "--seed=1")
    assert f"{STUDY} was begun with other seed: give this study another --name" in other.err
    settings = [trial.user_attrs["settings"] for trial in trials()]
    assert [f"--lr={setting['lr']}" for setting in settings] == [shlex.split(line)[4] for line in plan]
    assert all(1e-4 <= setting["lr"] <= 1 and setting["n"] in range(1, 10) for setting in settings)


def test_bayes_learns_from_the_results_and_stops_at_the_target(sweep):
    def search(method: str) -> list[float]:
        keys = RANDOM | {"method": method, "run_cap": 60, "metric": {"name": "val/loss", "target": 6e-5}}
        journal = Journal(Plan(read_sweep_file(sweep(**keys)), STUDY, [], n_runs=60, jobs=1, seed=0), in_memory=True)
        values = []
        while run := journal.next():
            values.append(run.settings["lr"] / 2)
            journal.record(run, values[-1], error=None)
        return values

    values = search("bayes")
    assert min(values) == values[-1] <= 6e-5 < min(values[:-1])
    assert 10 < len(values) < 40
    assert min(search("random")) > 6e-5  # in all 60 runs


def test_a_study_ends_at_the_target_and_only_its_first_command_is_known_before(llm_train, sweep):
    path = sweep(**RANDOM | {"method": "bayes", "run_cap": 3, "metric": {"name": "val/loss", "target": 1}})
    first, note = llm_train("study", path, "--dry_run").out.splitlines()
    assert ("stub.py" in first, note) == (True, "# the next ones depend on the results")
    done = llm_train("study", path)
    assert (done.code, len(trials())) == (0, 1)
    assert "(1 of 3 runs done, 0 failed, the target is reached)" in done.err
    again = llm_train("study", path)
    assert (again.code, len(trials())) == (0, 1)
    assert "(1 of 3 runs done, 0 failed, the target is reached)" in again.err


def test_a_run_that_is_not_among_the_best_at_a_rung_is_stopped_and_not_repeated(llm_train, sweep):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    path = sweep(parameters={"lr": {"values": [0.1, 0.9]}}, early_terminate=rule)
    done = llm_train("study", path, "--act=wait")
    assert done.code == 0
    assert "[2/2] lr=0.9  val/loss 0.4500, stopped early" in done.err
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "PRUNED"]
    assert "2 runs, 2 of them done" in llm_train("study", path, "--act=wait").err
    assert len(trials()) == 2


def test_half_a_row_of_metrics_is_no_value(sweep):
    plan = Plan(read_sweep_file(sweep()), STUDY, [], n_runs=1, jobs=1, seed=0)
    run = Journal(plan, in_memory=True).next()
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.csv").write_text("step,val/loss\r\n1,3.25\r\n2,1")  # of 10.5
    assert run.result() == ("val/loss", 3.25)


def test_a_study_whose_first_run_lacks_the_metric_stops_and_goes_on_with_the_right_one(llm_train, sweep):
    done = llm_train("study", sweep(metric={"name": "val/los"}), "--jobs=2")
    assert done.code == 1
    assert "failed: it has logged no val/los (did you mean 'val/loss'?)" in done.err
    assert "stopping: the first run has logged no val/los, so no further run starts" in done.err
    assert len([line for line in done.err.splitlines() if line.startswith("[")]) == 2  # both had been started
    assert "again  " not in done.err
    (STUDY / "lr=0.3,seed=1/given.json").unlink()
    done = llm_train("study", sweep())
    assert (done.code, done.err.count("finished before"), "(4 of 4 runs done" in done.err) == (0, 2, True), done.err
    assert not (STUDY / "lr=0.3,seed=1/given.json").exists()
    assert goal_of(STUDY) == ("val/loss", "minimize")
    highest = {"name": "val/loss", "goal": "maximize"}
    assert "4 runs, 4 of them done" in llm_train("study", sweep(metric=highest)).err
    assert goal_of(STUDY) == ("val/loss", "maximize")
    rule = {"type": "hyperband", "min_iter": 2}
    for keys in ({"metric": highest | {"target": 1}}, {"metric": highest, "early_terminate": rule}):
        refused = llm_train("study", sweep(**keys))
        assert (refused.code, "was begun with other metric: give" in refused.err) == (1, True), refused.err


def test_a_run_without_a_finite_value_of_the_metric_stops_no_other(llm_train, sweep):
    path = sweep(parameters={"lr": {"values": ["nan", 0.1]}})
    done = llm_train("study", path)
    assert "[1/2] lr=nan  failed: no value of val/loss is finite" in done.err
    assert "[2/2] lr=0.1  val/loss 0.0500" in done.err
    assert f"again   llm-train study {path}" in done.err


REFUSING = """import runpy, sys; {"--lr=9", "--typo=1"} & {*sys.argv} and sys.exit(2); runpy.run_path("stub.py")"""


def test_a_changed_study_begins_anew_as_long_as_no_run_has_begun(llm_train, sweep):
    command = ["${interpreter}", "-c", REFUSING, "fit", "--run.topic=toy", "${args}"]
    refused = llm_train("study", sweep(**RANDOM, command=command), "--runs=2", "--typo=1")
    assert (refused.code, "(0 of 2 runs done, 1 failed)" in refused.err) == (1, True), refused.err
    before = (STUDY / "journal.log").read_text()
    (failed,) = settings_of(STUDY, read_sweep_file(sweep(**RANDOM, command=command)))
    (STUDY / failed).mkdir()  # the record of a run that Lightning has refused
    (STUDY / failed / "summary.json").write_text('{"status": "failed"}')
    path = sweep(**RANDOM | {"parameters": {"lr": {"min": 0.1, "max": 0.2}}}, command=command)
    planned = llm_train("study", path, "--runs=2", "--seed=1", "--dry_run")
    assert planned.code == 0, planned.err
    assert (STUDY / "journal.log").read_text() == before
    done = llm_train("study", path, "--runs=2", "--seed=1")
    assert (done.code, "(2 of 2 runs done, 0 failed)" in done.err) == (0, True), done.err
    assert (STUDY / "journal.log").read_text().startswith(before)
    arms = settings_of(STUDY, read_sweep_file(path))
    assert [f"--run.name={arm}" for arm in arms] == [line.split()[-1] for line in planned.out.splitlines()]
    assert "2 runs, 2 of them done" in llm_train("study", path, "--runs=2", "--seed=1").err


@pytest.mark.slow
def test_values_can_be_added_to_a_grid_and_those_without_a_run_removed(llm_train, sweep):
    command = ["${interpreter}", "-c", REFUSING, "fit", "--run.topic=toy", "${args}"]
    seeds = {"seed_everything": {"values": [1, 2]}}

    def study(*rates: float, **more: object):
        done = llm_train("study", path := sweep(command=command, parameters={"lr": {"values": rates}} | seeds | more))
        return path, done, [line.split()[1] for line in done.err.splitlines() if line.startswith("[")]

    _, done, ran = study(0.3, 9)
    assert (done.code, len(ran), "(2 of 4 runs done, 2 failed)" in done.err) == (1, 4, True), done.err
    path, done, ran = study(0.2, 0.3, 0.1)
    assert done.code == 0, done.err
    assert "6 runs, 2 of them done" in done.err
    assert ran == ["lr=0.2,seed=1", "lr=0.2,seed=2", "lr=0.1,seed=1", "lr=0.1,seed=2"]
    assert {"lr=0.3,seed=1", "lr=0.1,seed=2"} < settings_of(STUDY, read_sweep_file(path)).keys()
    names = [line.split()[-1] for line in llm_train("study", path, "--dry_run").out.splitlines()]
    assert names == [f"--run.name=lr={rate},seed={seed}" for rate in (0.2, 0.3, 0.1) for seed in (1, 2)]
    for rates, more in (((0.2, 0.3), {}), ((0.2, 0.3, 0.1), {"act": {"value": "x"}})):
        _, done, ran = study(*rates, **more)
        assert (done.code, ran, "was begun with other parameters: give this" in done.err) == (1, [], True), done.err


def test_arms_that_an_earlier_version_has_named_keep_their_names(llm_train, sweep):
    def study(*sources: str, more: tuple[str, ...] = ()):
        return llm_train("study", sweep(parameters={"data.source": {"values": sources}}), *more)

    assert study("my.txt", "b.txt").code == 0
    journal = STUDY / "journal.log"
    for now, earlier in (("my.txt", "source=txt"), ("b.txt", "source=txt,run=2")):
        (STUDY / f"source={now}").rename(STUDY / earlier)
        journal.write_text(journal.read_text().replace(f"source={now}", earlier))
    planned = [line.split()[-1] for line in study("b.txt", "my.txt", "c.txt", more=("--dry_run",)).out.splitlines()]
    assert planned == ["--run.name=source=txt,run=2", "--run.name=source=txt", "--run.name=source=c.txt"]
    done = study("b.txt", "my.txt", "c.txt")
    assert [line.split()[1] for line in done.err.splitlines() if line.startswith("[")] == ["source=c.txt"], done.err


def test_a_study_says_when_a_file_of_its_command_has_changed(llm_train, sweep):
    command = ["${interpreter}", "stub.py", "fit", "-c", "base.yaml", "${args}"]
    Path("base.yaml").write_text("run: {topic: toy}\ntrainer: more/trainer.yaml\n")
    Path("more").mkdir()
    named = Path("more/trainer.yaml")
    named.write_text("max_steps: 1\n")

    def changed(n_runs: int) -> list[str]:
        done = llm_train("study", sweep(command=command), f"--runs={n_runs}")
        assert done.code == 0, done.err
        return [line for line in done.err.splitlines() if "has changed" in line]

    assert changed(1) == []
    named.write_text("max_steps: 1  # a comment\n")
    assert changed(2) == []
    named.write_text("max_steps: 2\n")
    assert changed(2) == []  # no run is left
    note = f"study   {named} has changed since the study began: runs before and after differ"
    assert changed(3) == [note]
    journal = STUDY / "journal.log"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:  # as an earlier version has written it
        line.get("user_attr", {}).get("asked", {}).pop("files", None)
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert changed(4) == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("hello\nerror: a mistake\nwandb: bye\n", "a mistake"),
        ("Traceback (most recent call last):\n  File 1\nA: an earlier one\nerror: a mistake\n", "a mistake"),
        (
            "Traceback (most recent call last):\n  File 1\nKeyError: 1\n\nDuring handling:\n\n"
            "Traceback (most recent call last):\n  File 2\n    ^^^\nmy.Error: it does not fit\nSubtypes:\n  - a\n"
            "Given value: Namespace(a=1)\n",
            "my.Error: it does not fit",
        ),
        ("killed by something\n\n", "killed by something"),
        ("", "exit code 1"),
    ],
)
def test_the_reason_of_a_failed_run_is_the_first_line_of_its_last_error(sweep, output, reason):
    run = Journal(Plan(read_sweep_file(sweep()), STUDY, [], n_runs=1, jobs=1, seed=0), in_memory=True).next()
    run.log.parent.mkdir(parents=True)
    run.log.write_text("error: of an earlier start\n")
    run.prepare()
    with run.log.open("a") as log:
        log.write(output)
    assert run.error(1) == reason


def test_a_sweep_needs_no_metric_and_its_runs_can_read_their_settings_in_a_file(llm_train, sweep):
    command = ["${interpreter}", "stub.py", "--run.topic=toy", "${args_json_file}"]
    done = llm_train("study", sweep(metric=None, command=command), "--runs=1", "--name", "other")
    assert (done.code, "[1/1] lr=0.3,seed=1" in done.err) == (0, True)
    run = Path("runs/toy/other/lr=0.3,seed=1")
    seen = json.loads((run / "given.json").read_text())
    assert (seen["lr"], seen["seed_everything"], (run / "metrics.csv").is_file()) == (0.3, 1, True)


# Interrupted


def test_a_killed_study_is_resumed(llm_train, forked, sweep):
    saved, killed = "act=save_and_meet", "act=kill"
    command = ("study", sweep(parameters={"act": {"values": ["save_and_meet", "kill"]}}), "--jobs", "2")
    os.mkfifo("pipe")
    assert forked(*command) == -signal.SIGKILL
    holder = (STUDY / ".lock").read_text().strip()
    outlived = llm_train(*command)
    assert (outlived.code, f"the study of {holder} is running, or a run that has outlived it" in outlived.err) == (
        1,
        True,
    )
    for arm in (saved, killed):
        os.kill(given(arm)["pid"], signal.SIGKILL)
    with (STUDY / "journal.log").open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)  # as soon as both runs have ended
        journal.write('{"op_code":6,"wor')  # what a kill can leave
    Path("go").touch()  # the second run starts anew and must not wait again
    done = llm_train(*command)
    assert done.code == 0, done.err
    assert given(saved)["ckpt_path"] == f"{STUDY}/{saved}/{LAST}"  # of this run, whatever runs have its name
    assert "ckpt_path" not in given(killed)
    assert [trial.state.name for trial in trials()] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert holder.startswith("process ")
    assert not (STUDY / ".lock").exists()


def test_a_study_on_a_full_disk_says_where(llm_train, sweep, monkeypatch):
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Journal, "record", write)
    refused = llm_train("study", sweep())
    assert refused.err.splitlines()[-1] == f"error: [Errno 28] No space left on device: '{STUDY}'"


def test_a_run_that_starts_again_competes_once(sweep, tmp_path):
    rule = {"type": "hyperband", "min_iter": 1, "eta": 2}
    plan = Plan(read_sweep_file(sweep(method="random", run_cap=4, early_terminate=rule)), tmp_path, [], 4, 1, 0)

    def is_stopped(run: Attempt, value: float) -> bool:
        run.trial.report(value, 1)
        return run.trial.should_prune()

    journal = Journal(plan)
    is_stopped(failed := journal.next(), 1.0)
    journal.record(failed, None, "it failed")
    journal = Journal(plan)
    # The last value is in the better half of the four; with that of the run that failed, it would not be of five.
    assert [is_stopped(journal.next(), value) for value in (1.0, 3.0, 4.0, 2.0)] == [False, True, True, False]


def test_a_run_whose_folder_was_removed_competes_once_and_counts_for_the_target_when_it_has_it_again(sweep, tmp_path):
    rule = {"type": "hyperband", "min_iter": 1, "eta": 2}
    metric = {"name": "val/loss", "target": 1}
    path = sweep(method="random", run_cap=4, metric=metric, early_terminate=rule)
    plan = Plan(read_sweep_file(path), tmp_path, [], 4, 1, 0)

    def ended(journal: Journal, value: float) -> bool:
        run = journal.next()
        run.trial.report(value, 1)
        is_stopped = run.trial.should_prune()
        run.folder.mkdir()
        journal.record(run, value, None)
        return is_stopped

    ended(journal := Journal(plan), 1.0)
    assert journal.reached_target
    (removed,) = journal.outcomes
    (tmp_path / removed).rmdir()
    journal = Journal(plan)
    assert not journal.reached_target
    assert [ended(journal, value) for value in (1.5, 3.0, 4.0, 2.0)] == [False, True, True, False]
    assert not journal.reached_target


def test_a_study_runs_on_a_file_system_without_locks(llm_train, sweep, monkeypatch):
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = llm_train("study", sweep(), "--runs=1")
    assert (done.code, "[1/1] lr=0.3" in done.err) == (0, True), done.err


@pytest.mark.parametrize("link", ["journal.log", "logs", "logs/lr=0.1.log"])
def test_a_study_writes_through_no_link_out_of_its_folder(llm_train, sweep, link):
    Path("precious").mkdir()
    (STUDY / link).parent.mkdir(parents=True)
    (STUDY / link).symlink_to(Path("precious").absolute())
    done = llm_train("study", sweep())
    assert (done.code, done.err.count("\n"), f"{STUDY / link} is a link to" in done.err) == (1, 1, True), done.err
    assert not list(Path("precious").iterdir())


# A process that is started in the background ignores SIGINT, and so do its children.
listen_to_sigint = partial(signal.signal, signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_after_a_signal_the_runs_save_and_the_same_command_resumes_them(llm_train, forked, sweep, name, code, capfd):
    command = ("study", sweep(parameters={"lr": {"values": [0.1, 0.3]}, "act": {"value": name}}))
    assert forked(*command, prepare=listen_to_sigint) == code
    printed = capfd.readouterr().err
    assert "(1 of 2 runs done, 0 failed)" in printed
    assert f"resume  llm-train study {command[1]}\n" in printed
    done = llm_train(*command)
    assert done.code == 0, done.err
    assert given("lr=0.3")["ckpt_path"] == f"{STUDY}/lr=0.3/{LAST}"
    assert "[2/2] lr=0.3  val/loss 0.1500" in done.err


def test_a_second_signal_kills_runs_that_do_not_exit(forked, sweep, capfd):
    command = ("study", sweep(), "--runs=1", "--act=stubborn")
    os.mkfifo("pipe")
    with open(os.open("pipe", os.O_RDONLY | os.O_NONBLOCK), "rb") as pipe:
        assert forked(*command, prepare=listen_to_sigint) == 130
        assert "once more kills them" in capfd.readouterr().err
        with pytest.raises(ProcessLookupError):
            os.kill(given("lr=0.3,seed=1")["pid"], 0)
        assert select.select([pipe], [], [], 10)[0]  # the process that the run has started has ended too


def test_a_study_under_nohup_ignores_the_signal(forked, sweep, capfd):
    command = ("study", sweep(parameters={"lr": {"values": [0.1, 0.3]}, "act": {"value": "SIGHUP"}}))
    assert forked(*command, prepare=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)) == 0
    assert "(2 of 2 runs done, 0 failed)" in capfd.readouterr().err


def test_a_run_whose_folder_was_removed_is_started_again(llm_train, sweep):
    path = sweep()
    before = llm_train("study", path, "--dry_run").out
    llm_train("study", path)
    with (STUDY / "journal.log").open("a") as journal:
        journal.write('{"op_code":6,"wor')  # half a line, as while the study runs
    assert llm_train("study", path, "--dry_run").out == before  # the names are those of the runs that are there
    changed = llm_train("study", sweep("changed.yaml", parameters={"lr": {"value": 1}}), "--name=sweep", "--dry_run")
    assert (changed.code, "was begun with other parameters" in changed.err) == (1, True), changed.err
    shutil.rmtree(STUDY / "lr=0.1,seed=2")
    again = llm_train("study", path, "--seed=1")  # which a grid does not use
    assert again.code == 0
    assert "4 runs, 3 of them done" in again.err
    assert [line.split()[1] for line in again.err.splitlines() if line.startswith("[")] == ["lr=0.1,seed=2"]
    assert (STUDY / "lr=0.1,seed=2/summary.json").is_file()


def test_values_can_be_mappings_of_numbers(sweep):
    read = read_sweep_file(
        sweep(parameters={"schedule": {"values": [{0: 1, 10: 4}, {0: 4}]}, "fixed": {"value": {1: 2}}})
    )
    plan = Plan(read, STUDY, [], n_runs=2, jobs=1, seed=0)
    STUDY.mkdir(parents=True)
    first = Journal(plan).next()
    again = Journal(plan).next()
    assert again.settings == first.settings == {"schedule": {"0": 1, "10": 4}, "fixed": {"1": 2}}
    assert settings_of(STUDY, read).keys() == {first.arm}


def test_a_run_that_finished_unseen_is_not_repeated(llm_train, sweep):
    path = sweep()
    llm_train("study", path, "--runs=1")
    journal = STUDY / "journal.log"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))  # killed before it could write the result
    (STUDY / "lr=0.3,seed=1/given.json").unlink()
    summary = STUDY / "lr=0.3,seed=1/summary.json"
    whole = summary.read_text()
    summary.write_text(whole[:-1])
    damaged = llm_train("study", path, "--runs=1")
    assert (damaged.code, f"error: {summary} is damaged" in damaged.err.splitlines()[-1]) == (1, True), damaged.err
    summary.write_text(whole)
    done = llm_train("study", path, "--runs=1")
    assert (done.code, "[1/1] lr=0.3,seed=1  val/loss 0.1500  (finished before)" in done.err) == (0, True)
    assert not (STUDY / "lr=0.3,seed=1/given.json").exists()


# Errors, and what is not imported


def test_an_error_of_the_study_stops_its_runs(llm_train, sweep, monkeypatch):
    started = []
    monkeypatch.setattr(launchers, "Popen", lambda *args, **given: started.append(Popen(*args, **given)) or started[-1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    parameters = {"trainer.devices": {"values": [1, 4]}, "act": {"value": "wait"}}
    done = llm_train("study", sweep(parameters=parameters), "--jobs=2")
    assert (done.code, "devices=4 asks for 4 devices, and there are 2 GPUs" in done.err) == (1, True), done.err
    (first,) = started
    assert first.wait(timeout=30) in (-signal.SIGTERM, 128 + signal.SIGTERM)


def test_a_study_runs_without_torch(sweep):
    main = f"import sys; from experiments.__main__ import main; main(['study', {str(sweep())!r}, '--runs=1'])"
    program = [sys.executable, "-c", f"{main}; print('torch' in sys.modules)"]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(forks.ROOT)})
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert "[1/1] lr=0.3,seed=1  val/loss 0.1500" in done.stderr
    assert "Warning" not in done.stderr


def test_what_a_study_cannot_do_costs_one_line(llm_train, sweep, tmp_path):
    def error(*args: object, **keys: object) -> str:
        done = llm_train("study", sweep(**keys), *args)
        assert done.code
        return done.err.splitlines()[-1]

    assert "method random has no end; add run_cap: to the file, or use --runs N" in error(method="random")
    missing = ["${interpreter}", "-m", "experiments", "fit", "-c", "missing.yaml", "${args}"]
    assert "its command runs missing.yaml: does not exist in" in error(command=missing)
    assert "add --run.topic=NAME to it" in error(command=["${interpreter}", "stub.py", "${args}"])
    assert "must be a whole number of at least 1, got 0" in error("--jobs", "0")
    assert "no such option: --trainer.max_steps; write --key=value for the runs" in error("--trainer.max_steps", "3")
    assert "no such option: --job=2 (did you mean --jobs?)" in error("--job=2")
    assert "no such option: --job (did you mean --jobs?)" in error("--job", "2")
    experiment = llm_train("study", TINY)
    assert f"{TINY}: is an experiment and not a sweep file: `llm-train fit -c {TINY}` runs it" in experiment.err
    assert "--lr: the study varies lr, and the flag would set it in every run; leave one out" in error("--lr=2")
    assert "--run.name: the study names its runs" in error("--", "--run.name=mine")
    preset = llm_train("study", sweep(), "--dry_run", "--trainer.callbacks+=Timer", "--", "--config", "trainer/gpu")
    assert (preset.code, "--config trainer/gpu" in preset.out) == (0, True)
    assert not Path("runs").exists()
    llm_train("study", sweep(), "--runs=1")
    advice = f"give this study another --name; `llm-train compare {STUDY} {STUDY.parent}/NAME` compares the two"
    assert f"{STUDY} was begun with other parameters: {advice}" in error(parameters={"lr": {"value": 1}})
    assert f"{STUDY} was begun with other flags: {advice}" in error("--trainer.max_steps=3")
    (tmp_path / "runs/toy/run").mkdir()
    (tmp_path / "runs/toy/run/config.yaml").touch()
    assert "runs/toy/run is the folder of a run; give the study another --name" in error("--name", "run")


# The real command


@pytest.mark.slow
def test_a_study_of_the_real_command_leaves_ordinary_runs_that_can_be_compared(llm_train, tiny, sweep, monkeypatch):
    monkeypatch.setattr(launchers, "Popen", forks.StudyProcess)
    tiny(trainer__max_steps=4, trainer__val_check_interval=2)
    command = ["${env}", "${interpreter}", "-m", "experiments", "fit", "-c", "tiny.yaml", "${args}"]
    parameters = {"optimizer": {"parameters": {"lr": {"values": [0.01, 0.02]}}}, "model.n_layer": {"value": 1}}
    done = llm_train("study", sweep("rates.yaml", command=command, parameters=parameters))
    study = RUNS / "rates"
    assert done.code == 0, (done.err, (study / "logs/lr=0.01.log").read_text())
    config = yaml.safe_load((study / "lr=0.01/config.yaml").read_text())
    assert config["run"] == {"name": "lr=0.01", "root": "runs", "topic": RUNS.name, "study": "rates"}
    assert (config["optimizer"]["init_args"]["lr"], config["model"]["init_args"]["n_layer"]) == (0.01, 1)
    best = {lr: json.loads((study / f"lr={lr}/summary.json").read_text())["best"]["value"] for lr in ("0.01", "0.02")}
    for number, (lr, value) in enumerate(best.items(), start=1):
        assert f"[{number}/2] lr={lr}  val/loss {value:.4f}" in done.err

    compared = llm_train("compare", study)
    assert (compared.code, compared.err) == (0, "")
    assert "lr=0.02  lr=0.01" in compared.out
    with (study / "comparison/runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["lr"], row["seed"]) for row in rows] == [("0.01", "5"), ("0.02", "5")]
    for row in rows:
        column = next(name for name in row if name.startswith("val/loss, best"))
        assert float(row[column]) == pytest.approx(best[row["lr"]], rel=1e-6)

    parameters["optimizer"]["parameters"]["lr"]["values"] += ["x", 0.03]
    refused = llm_train("study", sweep("rates.yaml", command=command, parameters=parameters), "--runs=3")
    assert "[3/3] lr=x  failed: " in refused.err
    for path, is_said in ((study, True), (study / "lr=0.01", False)):
        note = f"Not compared, of the 3 runs of {study}: 1 failed before the start, 0 not run."
        assert (note in llm_train("compare", path).out) == is_said

    again = llm_train("fit", "-c", study / "lr=0.01/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert f"{study / 'lr=0.01'} (finished at step 6" in again.err
