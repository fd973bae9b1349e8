"""YAML as it is read everywhere: a key twice, null, lists beside the lists that they add to, aliases."""

import inspect
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import RUNS

from experiments.comparison.runs import read_folder
from experiments.errors import UserError
from experiments.yaml_files import load_yaml, read_yaml

TWICE = "trainer: {max_steps: 4}\nseed_everything: 1\ntrainer:\n  accelerator: cpu\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MISTAKES = [
    (TWICE, ", line 3: 'trainer' is there twice, first in line 1; remove one of the two"),
    ("a: {b: 1, c: 2, b: 3}\n", ", line 1: 'b' is there twice, first in line 1"),
    ("- x\n- {b: 1,\n   b: 3}\n", ", line 3: 'b' is there twice, first in line 2"),
    ("a: &a\n  b: *a\n", ", line 1: an alias contains itself"),
    (BOMB, "holds more than 1,000,000 values if its aliases are written out"),
    ("a: [\n", ", line 2: "),
    ("a: !!python/name:os.system\n", ", line 1: could not determine a constructor"),
    ("a: 2024-02-30\n", ": day is out of range for month"),
    ("a: !!int ''\n", ": string index out of range"),
    ("[" * 101 + "]" * 101, ", line 1: is nested more than 100 levels deep"),
    ("a: " + "[" * 100_000, ", line 1: "),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=[said[:30] for _, said in MISTAKES])
def test_a_file_that_is_not_read_says_the_line(text, said):
    Path("a.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(Path("a.yaml"))
    assert str(caught.value).startswith("a.yaml")
    assert said in str(caught.value)
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "a: &a {b: 1}\nc: {<<: *a, b: 2}\nd: *a\n", "1: x\n'1': y\n", "a: {}\nb: {a: {a: 1}}\n"],
)
def test_what_is_not_twice_is_read_as_usual(text):
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_key_twice_in_an_experiment_is_refused_with_its_line(llm_train, tiny, command):
    config = tiny()
    config.write_text(config.read_text() + "trainer: {max_steps: 3}\n")
    first = config.read_text().splitlines().index("trainer:") + 1
    done = llm_train(command, "-c", config)
    last = len(config.read_text().splitlines())
    expected = f"error: {config}, line {last}: 'trainer' is there twice, first in line {first}; remove one of the two\n"
    assert (done.code, done.err) == (2, expected)


def test_a_key_twice_is_refused_by_the_commands_that_read_runs_and_sweeps(llm_train, tiny, whole):
    tiny()
    shutil.copytree(whole(), "run")
    with Path("run/config.yaml").open("a") as file:
        file.write("model: {}\n")
    generated = llm_train("generate", "--run", "run", "--prompt", "a")
    assert (generated.code, "'model' is there twice" in generated.err) == (1, True)
    with pytest.raises(UserError, match="'model' is there twice"):
        read_folder(Path("run"))
    Path("sweep.yaml").write_text("method: grid\nparameters: {a: {values: [1]}}\nmethod: random\n")
    studied = llm_train("study", "sweep.yaml")
    assert (studied.code, "line 3: 'method' is there twice" in studied.err) == (1, True)


def test_a_list_and_what_is_added_to_it_in_one_file_are_one_list(parse, tiny):
    def names(config: dict) -> list[str]:
        return [callback["class_path"].rsplit(".", 1)[-1] for callback in config["trainer"]["callbacks"]]

    prefix = "lightning_modules.runtime"
    config = tiny()
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"] = [{"class_path": f"{prefix}.checkpoint.RunCheckpoint"}]
    content["trainer"]["callbacks+"] = {"class_path": f"{prefix}.reproducible.ReproducibleSteps"}
    config.write_text(yaml.safe_dump(content))
    assert names(parse("fit", "-c", config)) == ["RunCheckpoint", "ReproducibleSteps"]
    Path("more.yaml").write_text(f"trainer: {{callbacks+: [{{class_path: {prefix}.stop.GracefulStop}}]}}\n")
    assert names(parse("fit", "-c", config, "-c", "more.yaml"))[2:] == ["GracefulStop"]


@pytest.mark.parametrize(
    ("flag", "where"),
    [("--data.tokenizer=null", "--data.tokenizer: is null"), (None, "tiny.yaml, line {line}: data.tokenizer: is null")],
)
def test_a_null_that_an_argument_does_not_take_is_refused(llm_train, tiny, flag, where):
    config = tiny(data__init_args__tokenizer="byte" if flag else None)
    line = next(n for n, text in enumerate(config.read_text().splitlines(), start=1) if "tokenizer:" in text)
    done = llm_train("fit", "-c", config, *([flag] if flag else []))
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert where.format(line=line) in done.err
    Path("over.yaml").write_text("data: {init_args: {tokenizer: }}\n")
    assert "over.yaml, line 1: data.tokenizer: is null" in llm_train("fit", "-c", config, "-c", "over.yaml").err
    assert not RUNS.exists()


@pytest.mark.parametrize("flag", ["--optimizer=Adagrad", "--optimizer=torch.optim.Adagrad"])
def test_another_class_than_the_default_has_its_own_defaults(parse, tiny, flag):
    config = yaml.safe_load(tiny().read_text())
    defaults = inspect.signature(torch.optim.Adagrad).parameters
    for written in ({"lr": 0.5, "eps": 1e-3}, None):  # the arguments that somebody has named are kept
        config |= {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": written}}
        if written is None:
            del config["optimizer"]
        Path("written.yaml").write_text(yaml.safe_dump(config))
        got = parse("fit", "-c", "written.yaml", flag)["optimizer"]["init_args"]
        kept = written or {"lr": 1e-3}
        assert got["eps"] == kept.get("eps", defaults["eps"].default)
        assert (got["lr"], got["weight_decay"]) == (kept["lr"], defaults["weight_decay"].default)


def test_a_wrong_flag_is_blamed_and_not_a_line_of_yaml(llm_train, tiny):
    config = tiny()
    assert "n_layer:" in config.read_text()
    for flag in ("--model.n_layer=many", "--lr_scheduler.warmup=-1", "--data.source.pathz=x"):
        done = llm_train("fit", "-c", config, flag)
        assert done.code == 2
        assert done.err.startswith(f"error: --{flag[2:].rsplit('.', 1)[0]}")
        assert "line" not in done.err
    assert "(did you mean 'paths'?)" in done.err
