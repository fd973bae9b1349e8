"""Classes of the user in the working folder: found where the user names them, and hiding nothing that is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.working_folder import importable

CALLBACK = "import lightning as L\nimport {other}\n\n\nclass Mine(L.Callback):\n    pass\n"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a package and a module that it imports into the working folder, and return the package's name."""
    Path("package_of_a_user").mkdir()
    Path("package_of_a_user/__init__.py").write_text(CALLBACK.format(other="module_of_a_user"))
    Path("module_of_a_user.py").write_text("")
    yield "package_of_a_user"
    for name in ("package_of_a_user", "module_of_a_user"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("how", ["flag", "file", "package"])
def test_a_class_that_the_user_names_is_imported(llm_train, tiny, package, how):
    before = list(sys.path)
    callback = f"{package}.Mine"
    config = tiny(**{"trainer__callbacks+": [{"class_path": callback}]} if how == "file" else {})
    flags = ["--trainer.callbacks+", callback] if how != "file" else []
    done = llm_train("fit", "-c", config, "--print_config", *flags, *(["--allow", package] * (how == "package")))
    assert (done.code, callback in done.out) == (0, True), done.err
    assert sys.path == before


def test_a_module_of_the_folder_is_not_imported_unless_the_user_names_it(llm_train, tiny, package):
    with importable(["lightning.pytorch.callbacks.Timer", "text.txt"]):
        assert str(Path.cwd()) not in sys.path
    config = tiny(**{"trainer__callbacks+": [{"class_path": f"{package}.Mine"}]})
    Path("run").mkdir()
    config.rename("run/config.yaml")
    done = llm_train("fit", "-c", "run/config.yaml", "--print_config")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert f"--allow {package}" in done.err
    assert package not in sys.modules
    assert llm_train("fit", "-c", "run/config.yaml", "--print_config", "--allow", package).code == 0


PROGRAM = """
import sys
from experiments.working_folder import importable
with importable(["package_of_a_user.Mine"]):
    import package_of_a_user, shelve, yaml, lightning_modules.common.files
    assert "module_of_a_user" in sys.modules
"""


def test_files_of_the_folder_hide_no_module_that_is_installed(package):
    for name in ("shelve", "yaml", "lightning", "torch"):
        Path(f"{name}.py").write_text("raise SystemExit('it hides the real one')")
    Path("package_of_a_user/__init__.py").write_text("import module_of_a_user")
    Path("lightning_modules").mkdir()
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.append({root!r})\n{PROGRAM}"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_of_the_same_name_does_not_take_the_place_of_one_of_this_project():
    for name in ("experiments", "lightning_modules", "datamodules"):
        Path(f"foreign/{name}").mkdir(parents=True)
        Path(f"foreign/{name}/__init__.py").write_text("raise SystemExit('foreign')")
    program = "import sys, llm_train; sys.argv = ['llm-train', 'list', 'presets']; llm_train.main()"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["foreign", root])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "trainer/gpu" in done.stdout


def test_the_end_of_a_pipe_is_no_error():
    command = f"{sys.executable} -m experiments list presets | head -n 0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")
