"""A disk that is full: one line says where, and files that were saved stay; numbers that JSON does not have."""

import contextlib
import errno
import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import RUNS, contents

from experiments import __main__ as command
from lightning_modules.common import files
from lightning_modules.common.files import atomic_file, link_or_copy, replace_folder, write_json, write_text
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.export import ExportModel
from lightning_modules.runtime.loggers import MetricsCSV

FULL = (28, "No space left on device")


class FullAfter(io.FileIO):
    """A file on a disk with room for some bytes."""

    room = 0

    def write(self, data: bytes) -> int:
        FullAfter.room -= len(data)
        if FullAfter.room < 0:
            raise OSError(*FULL)
        return super().write(data)


@pytest.fixture
def disk_with_room_for(monkeypatch):
    """Return a function that limits the bytes which atomic files can still write."""

    def limit(n_bytes: int) -> None:
        FullAfter.room = n_bytes
        monkeypatch.setattr(files, "open", FullAfter, raising=False)

    return limit


def test_a_second_name_is_a_copy_on_a_file_system_without_links(tmp_path, monkeypatch):
    source, target = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    source.write_bytes(b"new")
    target.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, target)
    assert (target.read_bytes(), target.samefile(source)) == (b"new", False)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("room", [0, 1_000, 60_000])
def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one(disk_with_room_for, room):
    file, checkpoints = Path("checkpoints/last.ckpt"), AtomicCheckpointIO()
    checkpoints.save_checkpoint({"state_dict": {}, "global_step": 8}, file)
    disk_with_room_for(room)
    with pytest.raises(OSError, match=r"No space left on device: .*the earlier one is whole: 'checkpoints/last\.ckpt'"):
        checkpoints.save_checkpoint({"state_dict": {"w": torch.zeros(20_000)}, "global_step": 16}, file)
    assert checkpoints.load_checkpoint(file)["global_step"] == 8
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_a_first_checkpoint_that_does_not_fit_has_no_earlier_one(disk_with_room_for):
    disk_with_room_for(0)
    with pytest.raises(OSError, match=r"No space left on device: the checkpoint was not written: 'last\.ckpt'"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, "last.ckpt")


@pytest.mark.slow
def test_the_record_of_a_run_names_the_best_checkpoint_that_was_written(llm_train, tiny, monkeypatch):
    save = AtomicCheckpointIO.save_checkpoint

    def save_once(self: AtomicCheckpointIO, checkpoint: dict, path: str, **options: object) -> None:
        if checkpoint["global_step"] > 8:
            raise OSError(*FULL)
        save(self, checkpoint, path, **options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_once)
    assert llm_train("fit", "-c", tiny()).code == 1
    summary = json.loads((RUNS / "tiny/summary.json").read_text())
    assert (summary["status"], summary["best"]["step"]) == ("failed", 8)


def test_an_error_of_a_checkpoint_that_is_not_of_the_disk_stays():
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": threading.Lock()}, "last.ckpt")


def test_any_other_file_that_does_not_fit_is_named(disk_with_room_for):
    write_text(Path("a.json"), "whole")
    disk_with_room_for(3)
    with pytest.raises(OSError, match=r"No space left on device: 'a\.json'"):
        write_text(Path("a.json"), "longer")
    assert Path("a.json").read_text() == "whole"


def test_a_folder_that_does_not_fit_is_named_and_leaves_the_one_before_and_no_rest():
    def fill(folder: Path) -> None:
        write_text(folder / "a.txt", "new")
        raise OSError(*FULL)

    write_text(Path("model/a.txt"), "old")
    with pytest.raises(OSError, match="No space left on device: 'model'"):
        replace_folder(Path("model"), fill)
    assert contents(Path()) == {Path("model/a.txt"): b"old"}


def test_a_tokenizer_that_does_not_fit_is_named(tmp_path):
    def save(folder: Path) -> None:
        raise OSError(*FULL)

    trainer = SimpleNamespace(default_root_dir=tmp_path, fast_dev_run=False)
    module = SimpleNamespace(data=SimpleNamespace(tokenizer=SimpleNamespace(save_pretrained=save)))
    with pytest.raises(OSError, match=r"No space left on device: '.*/tokenizer'"):
        ExportModel().on_train_start(trainer, module)


def test_an_error_of_another_file_keeps_its_name():
    with pytest.raises(FileNotFoundError, match="lost"), atomic_file(Path("a.txt")):
        Path("lost").read_text()


def test_a_failed_run_does_not_try_again_to_write_metrics_that_had_no_room(disk_with_room_for, monkeypatch, tmp_path):
    logger = MetricsCSV()
    logger.attach(tmp_path, "topic", "name", "fit")
    logger.log_metrics({"loss": 1.0}, 0)
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", FullAfter, raising=False)
        FullAfter.room = 0
        with pytest.raises(OSError, match=r"metrics could not be written: .*metrics\.csv"):
            logger.flush()
    logger.log_metrics({"loss": 2.0}, 1)
    logger.flush()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,epoch,loss", "2,0,2.0"]


def test_an_error_of_a_library_without_a_number_is_one_line(monkeypatch, capsys):
    def main(args: object) -> None:
        raise ValueError("Os { code: 28, kind: StorageFull, message: 'No space left on device' }")

    monkeypatch.setattr("experiments.generate.main", main)
    with contextlib.suppress(SystemExit):
        command.main(["generate"])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    write_json(tmp_path / "a.json", {"a": nan, "b": [inf, -inf, 1.5], "c": {"d": (nan,)}, "e": "NaN"})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, None, 1.5],
        "c": {"d": [None]},
        "e": "NaN",
    }


@pytest.mark.slow
def test_the_summary_of_a_run_with_a_metric_that_is_not_a_number_is_json(llm_train, tiny, monkeypatch):
    from lightning_modules.runtime.checkpoint import RunCheckpoint

    def log_nan(self: RunCheckpoint, trainer: object, pl_module: object) -> None:
        pl_module.log("val/odd", torch.tensor(float("nan")))

    monkeypatch.setattr(RunCheckpoint, "on_validation_epoch_end", log_nan, raising=False)
    assert llm_train("fit", "-c", tiny(trainer__max_steps=8)).code == 0
    summary = json.loads((RUNS / "tiny/summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["metrics"]["val/odd"] is None
    assert llm_train("compare", RUNS / "tiny").code == 0
