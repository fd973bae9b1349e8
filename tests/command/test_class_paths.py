"""Class paths of configurations that an earlier version of the project wrote."""

import importlib
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import LAST, RUNS, assert_same_weights

from experiments.class_paths import current, import_class
from lightning_modules.runtime import checkpoint, loggers

ROOT = Path(__file__).parents[2]
OLD = {
    "lightning_modules.callbacks.checkpoint.RunCheckpoint": checkpoint.RunCheckpoint,
    "lightning_modules.callbacks.figures.LearningCurve": "lightning_modules.runtime.learning_curve.LearningCurve",
    "lightning_modules.loggers.MetricsCSV": loggers.MetricsCSV,
    "lightning_modules.checkpoint_io.AtomicCheckpointIO": "lightning_modules.runtime.checkpoint_io.AtomicCheckpointIO",
    "lightning_modules.sharded.FullyShardedStrategy": "lightning_modules.runtime.sharded.FullyShardedStrategy",
}


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_a_class_that_has_moved_is_found_by_its_name(old, new):
    expected = import_class(new) if isinstance(new, str) else new
    assert import_class(old) is expected


@pytest.mark.parametrize("old", ["datamodules.reviews.HubReviews", "lightning_modules.callbacks.export.ExportModel"])
def test_the_path_that_is_found_leads_to_the_class(old):
    module, name = current(old).rsplit(".", 1)
    assert current(old) != old
    assert getattr(importlib.import_module(module), name).__name__ == name


@pytest.mark.parametrize(
    "path",
    [
        "torch.optim.AdamW",
        "callbacks.export.ExportModel",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning_modules.runtime.export.ExportModel",
        "lightning_modules.optim.schedules.Cosine",
        "lightning_modules.callbacks.export.Nothing",
        "ExportModel",
    ],
)
def test_a_path_of_another_package_a_current_one_and_an_unknown_name_stay_as_they_are(path):
    assert current(path) == path


def test_a_class_is_found_that_has_left_a_module_which_still_exists():
    assert current("lightning_modules.base.ExportModel") == "lightning_modules.runtime.export.ExportModel"


def test_class_names_are_unique_in_a_room():
    for room in ("lightning_modules", "datamodules"):
        names: dict[str, set[str]] = {}
        for file in sorted((ROOT / room).rglob("*.py")):
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.startswith("class ") and not line.startswith("class _"):
                    names.setdefault(line.split()[1].split("(")[0].split("[")[0].rstrip(":"), set()).add(str(file))
        assert {name: files for name, files in names.items() if len(files) > 1} == {}


def old_paths(value: object) -> object:
    """Return a configuration with the class paths of the runtime as an earlier version had them."""
    text = yaml.safe_dump(value, sort_keys=False)
    for name in ("checkpoint_io", "loggers"):
        text = text.replace(f"lightning_modules.runtime.{name}.", f"lightning_modules.{name}.")
    text = text.replace("lightning_modules.runtime.learning_curve.", "lightning_modules.callbacks.figures.")
    return yaml.safe_load(text.replace("lightning_modules.runtime.", "lightning_modules.callbacks."))


@pytest.mark.slow
def test_the_configuration_of_an_old_run_resumes_and_validates(llm_train, forked, whole, tiny):
    from forks import die_after_step

    command = ("fit", "-c", tiny(), "--run.name", "old")
    assert forked(*command, prepare=lambda: die_after_step(16)) < 0
    config = RUNS / "old/config.yaml"
    written = old_paths(yaml.safe_load(config.read_text()))
    config.write_text(yaml.safe_dump(written, sort_keys=False))
    assert "lightning_modules.callbacks.export.ExportModel" in config.read_text()
    assert "lightning_modules.runtime" not in config.read_text()
    shutil.copy(config, "old.yaml")

    resumed = llm_train("fit", "-c", "old.yaml", "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(whole() / LAST, RUNS / "old" / LAST)
    validated = llm_train("validate", "-c", "old.yaml", "--ckpt_path", "last")
    assert validated.code == 0, validated.err
    value = (whole() / "metrics.csv").read_text().splitlines()[-1]
    (loss,) = (line.split()[-1] for line in validated.err.splitlines() if line.startswith("result  val/loss"))
    assert any(f"{float(cell):.4f}" == loss for cell in value.split(",") if cell)


def test_an_unknown_class_costs_one_line(llm_train, tiny):
    callback = {"class_path": "lightning_modules.callbacks.export.ExportModle"}
    done = llm_train("fit", "-c", tiny(**{"trainer__callbacks+": [callback]}))
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "lightning_modules.callbacks" in done.err
