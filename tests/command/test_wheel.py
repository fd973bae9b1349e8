"""The wheel: it holds every file of the packages, and its commands work in an empty folder without the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from shortened import ROOT, shortened

from experiments.study.sweep_file import read_sweep_file

pytestmark = pytest.mark.slow

EXPERIMENTS = ROOT / "experiments"
PACKAGES = ("experiments", "lightning_modules", "datamodules")
NOT_SHIPPED = {"README.md", ".png"}  # pages and figures of the topics are for readers of the repository

# Runs command lines in one process, as the entry point does, and prints their exit codes and output.
DRIVER = """
import contextlib, io, json, sys
import llm_train
commands = json.loads(sys.argv[1])
with contextlib.redirect_stdout(io.StringIO()) as help:
    sys.argv = ["llm-train", "--help"]
    llm_train.main()
assert "usage: llm-train" in help.getvalue()
from experiments.__main__ import main
import datamodules, experiments, lightning_modules
print(json.dumps([module.__file__ for module in (llm_train, datamodules, experiments, lightning_modules)]))
for command in commands:
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(command)
        except SystemExit as left:
            code = left.code or 0
    print(json.dumps([code, output.getvalue()]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, and unpack it as pip does into a folder of packages."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "llm_train.py"):
        shutil.copy(ROOT / name, sources)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    subprocess.run([sys.executable, "-P", "-c", build], cwd=sources, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "packages")
    return folder / "packages"


def test_the_wheel_holds_every_file_of_the_packages(installed):
    def files(root: Path) -> set[str]:
        found = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
        return {str(path.relative_to(root)) for path in found if "__pycache__" not in path.parts}

    missing = files(ROOT) - files(installed)
    assert sorted(name for name in missing if not name.endswith(tuple(NOT_SHIPPED))) == []
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "llm-train = llm_train:main" in entry_points.read_text()


def base_of(study: Path) -> Path:
    """Return the YAML of the experiment whose arms a study runs."""
    command = read_sweep_file(study).command
    return ROOT / command[command.index("-c") + 1]


def test_the_commands_of_the_wheel_work_in_an_empty_folder(installed, tmp_path):
    studies = sorted(EXPERIMENTS.glob("*/studies/*.yaml"))
    study = next(study for study in studies if not re.search("^# (Needs|Downloads):", base_of(study).read_text(), re.M))
    base = base_of(study)
    # The run of the study is a process of its own, which trains; the others import no PyTorch.
    commands = [
        ["list"],
        ["completion", "bash"],
        ["study", f"{study.parents[1].name}/{study.stem}", "--runs=1", "--", *shortened(base)],
        ["compare", "runs"],
        ["copy", f"{base.parent.name}/{base.stem}"],
        ["new", "letter_counts"],
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    environment |= {"PYTHONPATH": str(installed), "WANDB_MODE": "disabled"}
    words = [sys.executable, "-P", "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    places, *results = map(json.loads, done.stdout.splitlines())
    assert all(place.startswith(str(installed)) for place in places)
    for command, (code, output) in zip(commands, results, strict=True):
        assert code == 0, f"{' '.join(command)}: {output}"
        assert "Traceback" not in output, output
    (run,) = (tmp_path / "runs").glob("*/*/*/summary.json")
    assert json.loads(run.read_text())["status"] == "finished"
    assert not (installed / "runs").exists()
