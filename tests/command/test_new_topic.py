"""`llm-train new` and `llm-train copy`: what they write trains, passes its own tests, and touches nothing else."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml
from helpers import TINY

import datamodules
import lightning_modules
from experiments.names import SHIPPED, find
from experiments.new_topic.command import FOLDERS, with_row
from experiments.study.sweep_file import read_sweep_file

README = """# Project

| topic | what |
|---|---|
| [`a`](experiments/a/README.md) | a |
| | `b.yaml`: another experiment of a |

End.
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout in the working folder, whose packages are found beside those of the project."""
    for top in FOLDERS:
        (tmp_path / top).mkdir()
    (tmp_path / "README.md").write_text(README)
    for package in (lightning_modules, datamodules):
        monkeypatch.setattr(package, "__path__", [str(tmp_path / package.__name__), *package.__path__])
    return tmp_path


@pytest.mark.slow
def test_a_new_topic_passes_its_own_tests(llm_train, checkout):
    written = llm_train("new", "topic_of_a_test")
    assert written.code == 0, written.err
    assert "llm-train fit -c topic_of_a_test/offline\n" in written.out

    spec = importlib.util.spec_from_file_location("written", checkout / "tests/topic_of_a_test/test_topic_of_a_test.py")
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    found = {name: test for name, test in vars(tests).items() if name.startswith("test_")}
    assert len(found) == 5
    for test in found.values():
        test(*([llm_train] if inspect.signature(test).parameters else []))

    config = yaml.safe_load(Path("runs/topic_of_a_test/offline/config.yaml").read_text())
    assert config["model"]["class_path"] == "lightning_modules.topic_of_a_test.TopicOfATestModule"
    sweep = read_sweep_file(checkout / "experiments/topic_of_a_test/studies/width.yaml")
    assert "experiments/topic_of_a_test/offline.yaml" in sweep.command


def test_it_writes_four_folders_and_one_row(llm_train, checkout):
    llm_train("new", "topic_of_a_test")
    files = {path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file()}
    assert {path.parts[:2] for path in files} == {(top, "topic_of_a_test") for top in FOLDERS} | {("README.md",)}
    assert not [path for path in files if "majority" in path.name or "ajority" in path.read_text()]
    before, after = README.splitlines(), (checkout / "README.md").read_text().splitlines()
    (row,) = [line for line in after if line not in before]
    assert after.index(row) == before.index("| | `b.yaml`: another experiment of a |") + 1
    assert row.startswith("| [`topic_of_a_test`](experiments/topic_of_a_test/README.md) |")


def test_a_readme_without_a_table_gets_the_row_at_its_end():
    assert with_row("# Project\n", "x").splitlines()[-1].startswith("| [`x`]")


@pytest.mark.parametrize(
    ("name", "said"),
    [("Letters", "lower case"), ("class", "lower case"), ("a-b", "lower case"), ("taken", "exists; choose another")],
)
def test_a_name_that_cannot_be_is_refused_in_one_line(llm_train, checkout, name, said):
    (checkout / "lightning_modules/taken.py").touch()
    done = llm_train("new", name)
    assert (done.code, len(done.err.splitlines()), said in done.err) == (1, 1, True), done.err
    assert not list(checkout.glob("experiments/*"))


@pytest.mark.slow
def test_outside_a_checkout_a_topic_is_a_package_of_the_user(llm_train, monkeypatch):
    written = llm_train("new", "package_of_a_test")
    assert written.code == 0, written.err
    assert "python -m pytest package_of_a_test\n" in written.out
    assert Path(re.search(r"^read    (.*), and", written.out, re.MULTILINE)[1]).is_file()
    files = {path.relative_to(Path.cwd()): path for path in Path.cwd().rglob("*") if path.is_file()}
    assert {path.parts[0] for path in files} == {"package_of_a_test"}
    assert not [path for path, file in files.items() if "ajority" in path.name or "ajority" in file.read_text()]
    assert "test_package_of_a_test.py" in {path.name for path in files}

    listed = llm_train("list", "modules").out
    assert "package_of_a_test.PackageOfATestModule " in listed
    assert "package_of_a_test" in llm_train("list", "topics").out
    flags = ("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.train_examples=128")
    done = llm_train("fit", "-c", "package_of_a_test/offline", *flags)
    assert done.code == 0, done.err
    assert Path("runs/package_of_a_test/offline/accuracy_by_margin.csv").is_file()
    (following,) = (line for line in done.err.splitlines() if line.startswith("next"))
    assert following.endswith("--allow package_of_a_test")
    assert llm_train(*following.split()[2:]).code == 0
    planned = llm_train("study", "package_of_a_test/width", "--dry_run", "--runs=1")
    assert "-c package_of_a_test/offline.yaml" in planned.out

    monkeypatch.syspath_prepend(str(Path.cwd()))
    tests = importlib.import_module("package_of_a_test.test_package_of_a_test")
    tests.test_counts_and_margins_of_a_sequence_by_hand()
    assert tests.OFFLINE.is_file()


@pytest.mark.parametrize(
    ("name", "said"), [("json", "Python has a package json"), ("taken", "exists"), ("Letters", "lower case")]
)
def test_a_name_that_a_package_of_the_user_cannot_have(llm_train, name, said):
    Path("taken").mkdir()
    done = llm_train("new", name)
    assert (done.code, len(done.err.splitlines()), said in done.err) == (1, 1, True), done.err


def test_the_former_name_of_the_command_says_the_new_one(llm_train):
    done = llm_train("new-topic", "letters")
    assert (done.code, "did you mean 'new'?" in done.err) == (2, True)


TOPIC = TINY.parent.name
STUDY = next((SHIPPED / TOPIC / "studies").glob("*.yaml")).stem
# arguments, the copy, the command that runs it
COPIES = [
    ([f"{TOPIC}/offline"], "my_offline.yaml", "llm-train fit -c my_offline.yaml"),
    ([f"experiments/{TOPIC}/offline.yaml", "mine"], "mine.yaml", "llm-train fit -c mine.yaml"),
    ([f"{TOPIC}/{STUDY}"], f"my_{STUDY}.yaml", f"llm-train study my_{STUDY}.yaml"),
    (["trainer/gpu", "deep/er/gpu.yaml"], "deep/er/gpu.yaml", "llm-train fit -c FILE -c deep/er/gpu.yaml"),
    (["own.yaml", "folder"], "folder/own.yaml", "llm-train fit -c FILE -c folder/own.yaml"),
]


@pytest.mark.parametrize(("arguments", "copied", "command"), COPIES)
def test_a_copy_keeps_the_settings_and_says_what_to_do_next(llm_train, arguments, copied, command):
    Path("own.yaml").write_text("# Mine.\ntrainer: {max_steps: 1}\n")
    Path("folder").mkdir()
    source = find(arguments[0])
    done = llm_train("copy", *arguments)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == f"wrote   {copied}"
    assert done.out.splitlines()[-1] == f"next    {command}"
    before, after = (yaml.safe_load(path.read_text()) for path in (source, Path(copied)))
    assert after.pop("name", Path(copied).stem) == Path(copied).stem
    before.pop("name", None)
    assert after == before
    assert Path(copied).read_text()[:30] == source.read_text()[:30]  # the comment
    shipped = re.findall(r"experiments/[\w/]+\.yaml", "\n".join(re.findall("^#.*", Path(copied).read_text())))
    assert source.name not in [Path(name).name for name in shipped]
    again = llm_train("copy", *arguments)
    assert (again.code, f"{copied} exists" in again.err, len(again.err.splitlines())) == (1, True, 1)


def test_the_commands_in_the_comments_of_a_copy_name_the_copy(llm_train, tmp_path, monkeypatch):
    Path("mine").mkdir()
    Path("mine/width.yaml").write_text("# llm-train fit -c mine/width.yaml, not not_mine/width.yaml\nmodel: Net\n")
    llm_train("copy", "mine/width", "wide")
    assert Path("wide.yaml").read_text().splitlines()[0] == "# llm-train fit -c wide.yaml, not not_mine/width.yaml"
    monkeypatch.chdir(SHIPPED.parent)  # in a clone, the file is found as experiments/TOPIC/offline.yaml
    copied = tmp_path / "copy.yaml"
    llm_train("copy", f"{TOPIC}/offline", copied)
    assert f"# llm-train fit -c {copied}\n" in copied.read_text().replace("#   ", "# ")
    assert f"see experiments/{TOPIC}/README.md." in copied.read_text()


def test_a_copy_of_an_experiment_that_reads_another_run_says_what_makes_that(llm_train):
    source = next(file for file in SHIPPED.glob("*/offline.yaml") if "# Needs: " in file.read_text())
    copied = llm_train("copy", f"{source.parent.name}/offline")
    assert re.search(r"^needs   llm-train fit -c experiments/\w+/\w+\.yaml$", copied.out, re.MULTILINE)


def test_it_says_how_to_install_what_runs_the_tests(llm_train, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else find_spec(name))
    said = llm_train("new", "package_without_tests_run").out.splitlines()
    assert said.index("        pip install pytest") + 1 == said.index(
        "        python -m pytest package_without_tests_run"
    )
