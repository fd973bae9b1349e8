"""What a resumed run restores from its checkpoint: the best validation so far, and the rows of the metrics."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_modules.runtime import checkpoint
from lightning_modules.runtime.checkpoint import RunCheckpoint
from lightning_modules.runtime.loggers import MetricsCSV


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def files_written(callback: RunCheckpoint, step: int, loss: float) -> list[str]:
    """The checkpoints that are there after a validation of a step with a loss, if there were none."""
    folder = Path("checkpoints")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    trainer = SimpleNamespace(
        callback_metrics={"val/loss": loss},
        default_root_dir="",
        fast_dev_run=False,
        global_step=step,
        max_steps=step,
        current_epoch=0,
        is_last_batch=False,
        sanity_checking=False,
        is_global_zero=True,
        save_checkpoint=lambda file: file.touch(),
        state=SimpleNamespace(fn="fit"),
    )
    callback.on_validation_end(trainer, None)
    return sorted(file.stem for file in folder.iterdir())


@pytest.mark.parametrize(("mode", "best", "worse", "better"), [("min", 1.0, 1.5, 0.5), ("max", 1.0, 0.5, 1.5)])
def test_a_resumed_run_keeps_its_best_checkpoint_until_a_better_validation(mode, best, worse, better):
    first, resumed = (RunCheckpoint("val/loss", mode) for _ in range(2))
    assert files_written(first, 4, best) == ["best", "last"]
    resumed.load_state_dict(first.state_dict())
    assert files_written(resumed, 8, worse) == ["last"]
    assert (resumed.best_score, resumed.best_step, resumed.best_metrics) == (best, 4, {"val/loss": best})
    assert files_written(resumed, 12, better) == ["best", "last"]
    assert (resumed.best_score, resumed.best_step, resumed.best_metrics) == (better, 12, {"val/loss": better})


@pytest.mark.parametrize(("metrics", "written"), [({"val/loss": 2.0}, ["last"]), ({}, ["best", "last"])])
def test_a_run_resumed_with_another_metric_compares_with_that_metric_of_its_best(metrics, written):
    first = RunCheckpoint("val/accuracy", "max")
    first.best_score, first.best_step, first.best_metrics = 0.9, 4, metrics | {"val/accuracy": 0.9}
    resumed = RunCheckpoint("val/loss", "min")
    resumed.load_state_dict(first.state_dict())
    assert files_written(resumed, 8, 2.5) == written  # more than 0.9, which is no loss


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("first", [None, math.nan])  # `best.ckpt` of earlier versions may have a score that is NaN
def test_a_score_that_is_not_a_number_is_never_the_best(mode, first):
    callback = RunCheckpoint("val/loss", mode)
    callback.load_state_dict({"best_score": first, "best_step": first and 2})
    assert files_written(callback, 4, math.nan) == ["last"]
    assert callback.best_step == (first and 2)
    assert files_written(callback, 12, 2.0) == ["best", "last"]
    assert (callback.best_score, callback.best_step) == (2.0, 12)
    assert files_written(callback, 16, math.nan) == ["last"]
    assert callback.best_score == 2.0


@pytest.mark.parametrize(("fails", "step"), [("save_checkpoint", 4), ("link_or_copy", 8)])
def test_the_best_step_is_that_of_the_file_that_was_written(monkeypatch, fails, step):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    callback = RunCheckpoint("val/loss")
    files_written(callback, 4, 2.0)
    if fails == "link_or_copy":
        monkeypatch.setattr(checkpoint, fails, full)
    else:
        monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match="No space left"):
        files_written(callback, 8, 1.0)
    callback.wait()  # as the record of a run does, whatever has ended it
    assert Path("checkpoints/best.ckpt").exists() == (fails == "link_or_copy")
    assert (callback.best_score, callback.best_step) == ({4: 2.0, 8: 1.0}[step], step)
    assert callback.best_metrics == {"val/loss": callback.best_score}
    assert callback._step_of_last == 4


def test_a_resumed_run_drops_the_rows_of_later_steps(tmp_path):
    first, resumed = MetricsCSV(), MetricsCSV()
    for logger in (first, resumed):
        logger.attach(tmp_path, "topic", "name", "fit")
    for step in (4, 8, 12):
        first.log_metrics({"train/loss": float(step)}, step=step - 1)
    first.flush()
    resumed.attach(tmp_path, "topic", "name", "fit")
    resumed.go_on_from(8, [])
    resumed.flush()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,epoch,train/loss", "4,0,4.0", "8,0,8.0"]


def test_a_run_that_was_killed_before_its_file_was_written_keeps_the_row_of_its_checkpoint(tmp_path):
    resumed = MetricsCSV()
    resumed.attach(tmp_path, "topic", "name", "fit")
    resumed.go_on_from(8, [{"step": 8, "epoch": 0, "val/loss": 2.0}])
    resumed.log_metrics({"val/loss": 1.0}, step=11)
    resumed.flush()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,epoch,val/loss", "8,0,2.0", "12,0,1.0"]
