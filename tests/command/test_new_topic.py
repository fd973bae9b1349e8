"""`llm-train new-topic`: what it writes trains, draws, passes its own tests, and touches nothing else."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import yaml

import datamodules
import lightning_modules
from experiments.new_topic.command import FOLDERS, with_row
from experiments.study.sweep_file import read_sweep_file

README = "# Project\n\n| topic | what |\n|---|---|\n| [`a`](experiments/a/README.md) | a |\n\nEnd.\n"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout in the working folder, whose packages are found beside those of the project."""
    for top in FOLDERS:
        (tmp_path / top).mkdir()
    (tmp_path / "README.md").write_text(README)
    for package in (lightning_modules, datamodules):
        monkeypatch.setattr(package, "__path__", [str(tmp_path / package.__name__), *package.__path__])
    return tmp_path


def test_a_new_topic_passes_its_own_tests(llm_train, checkout):
    written = llm_train("new-topic", "topic_of_a_test")
    assert written.code == 0, written.err
    assert "llm-train fit -c experiments/topic_of_a_test/offline.yaml" in written.out

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
    llm_train("new-topic", "topic_of_a_test")
    files = {path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file()}
    assert {path.parts[:2] for path in files} == {(top, "topic_of_a_test") for top in FOLDERS} | {("README.md",)}
    assert not [path for path in files if "majority" in path.name or "ajority" in path.read_text()]
    before, after = README.splitlines(), (checkout / "README.md").read_text().splitlines()
    (row,) = [line for line in after if line not in before]
    assert after.index(row) == before.index("| [`a`](experiments/a/README.md) | a |") + 1
    assert row.startswith("| [`topic_of_a_test`](experiments/topic_of_a_test/README.md) |")


def test_a_readme_without_a_table_gets_the_row_at_its_end():
    assert with_row("# Project\n", "x").splitlines()[-1].startswith("| [`x`]")


@pytest.mark.parametrize(
    ("name", "said"),
    [("Letters", "lower case"), ("class", "lower case"), ("a-b", "lower case"), ("taken", "exists; choose another")],
)
def test_a_name_that_cannot_be_is_refused_in_one_line(llm_train, checkout, name, said):
    (checkout / "lightning_modules/taken.py").touch()
    done = llm_train("new-topic", name)
    assert (done.code, len(done.err.splitlines()), said in done.err) == (1, 1, True), done.err
    assert not list(checkout.glob("experiments/*"))


def test_outside_a_checkout_it_says_so(llm_train):
    done = llm_train("new-topic", "letters")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "in the root of a checkout" in done.err
