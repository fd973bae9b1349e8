"""What a run shows while it trains: its opening lines, the line of its progress, and how it stops."""

import contextlib
import io
import os
import signal
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import RUNS
from torch.optim.lr_scheduler import LinearLR

from experiments.run import opening
from lightning_modules.optim.schedules import Constant
from lightning_modules.runtime import progress as lines
from lightning_modules.runtime.checkpoint import RunCheckpoint
from lightning_modules.runtime.progress import ProgressLine, RunProgress, terminal_width
from lightning_modules.runtime.stop import GracefulStop


@pytest.mark.parametrize(
    ("total", "shown"), [(40, "/40"), (None, "3 steps"), (float("inf"), "3 steps"), (-1, "3 steps")]
)
def test_a_run_without_a_length_shows_its_steps(total, shown):
    assert shown in RunProgress()._open("train", total, initial=3).text()


@pytest.mark.parametrize(
    ("n", "shown"),
    [(0.001, "a small part of an epoch"), (0.5, "0.5 epochs"), (1, "1 epoch"), (1.001, "1 epoch"), (2, "2 epochs")],
)
def test_one_epoch_is_singular(n, shown):
    assert opening.epochs(n) == shown


@pytest.mark.parametrize(
    ("warmups", "shown"),
    [
        ([48], "; the warm-up takes 48: the learning rate reaches 50% (lr_scheduler.warmup)"),
        ([24], ""),
        ([None], ""),  # of a schedule of torch
        ([], ""),
    ],
)
def test_a_warm_up_that_is_longer_than_the_run_is_said(warmups, shown):
    optimizer = torch.optim.SGD([torch.zeros(1)])
    schedules = [LinearLR(optimizer) if n is None else Constant(optimizer, 24, warmup=n) for n in warmups]
    trainer = SimpleNamespace(lr_scheduler_configs=[SimpleNamespace(scheduler=schedule) for schedule in schedules])
    assert opening._warm_up(trainer, 24) == shown


def test_metrics_are_read_when_they_are_logged_and_not_when_the_line_is_drawn(monkeypatch):
    read = []

    class Metrics(dict):
        def __contains__(self, name):
            read.append(batch)
            return False

    trainer = SimpleNamespace(callback_metrics=Metrics(), global_step=0, log_every_n_steps=4)
    trainer.estimated_stepping_batches = 8
    monkeypatch.setattr(lines.private_names, "is_accumulating", lambda _: batch % 3 != 0)
    progress = RunProgress(refresh_seconds=0)
    progress.on_train_start(trainer, None)
    for batch in range(1, 25):
        trainer.global_step = batch // 3
        progress.on_train_batch_end(trainer)
    assert set(read) == {12, 24}  # a reading makes the host wait for the GPU


@pytest.mark.slow
def test_a_file_has_one_line_for_the_last_step_and_neither_bars_nor_carriage_returns(llm_train, tiny):
    done = llm_train("fit", "-c", tiny())  # validates at the last step
    printed = [line for line in done.err.splitlines() if line.startswith("train")]
    assert "24/24" in printed[-1]
    assert len(printed) == len(set(printed))
    assert not {"\r", "\x1b", "█"} & set(done.err)
    said = done.err.splitlines()
    opening = said[said.index(f"run     {RUNS}/tiny") :][:5]
    assert [line[:8].strip() for line in opening] == ["run", "model", "epoch", "steps", "device"]
    assert "parameters, all trained" in opening[1]
    assert opening[3].startswith("steps   24 of 4 examples, ")
    assert opening[4] == "device  cpu, precision 32-true"


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 200])
def test_a_line_fits_into_its_terminal(width):
    line = ProgressLine("train", 24)
    line.position = 12
    line.shown = {"loss": "3.219", "val loss": "3.871", "tokens/s": "12,345"}
    text = line.text(width)
    assert len(text) <= width
    assert ("tokens/s" in text) == (width >= 79)
    assert ("|" in text) == (width not in (20, 79, 80))  # it has the columns that the metrics leave
    if width == 200:
        assert f"|{'█' * 10}{' ' * 10}| 12/24 [00:00<00:00, loss=3.219" in text


def test_the_width_is_that_of_the_variable_or_the_terminal_or_80(monkeypatch):
    monkeypatch.setenv("COLUMNS", "33")
    assert terminal_width() == 33
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))  # of one that does not say it
    assert terminal_width() == 80
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((132, 9)))
    assert terminal_width() == 132


def test_a_validation_of_a_fit_has_a_line_of_its_own_in_a_terminal(monkeypatch, capfd, llm_train, tiny):
    monkeypatch.setattr(lines, "on_terminal", lambda: True)
    monkeypatch.setattr(ProgressLine, "is_due", True)
    done = llm_train("fit", "-c", tiny(trainer__max_steps=8))
    drawn = done.err.split("\r\x1b[K")
    assert any(line.startswith("validate") and "1/" in line for line in drawn)
    assert drawn[-1].startswith("train")
    assert "8/8" in drawn[-1]
    # The line of the validation is removed before the next.
    after = drawn[max(i for i, line in enumerate(drawn) if line.startswith("validate")) + 1]
    assert after == ""


def test_lines_of_a_file_get_rarer(monkeypatch):
    now = 0.0
    monkeypatch.setattr(lines.time, "monotonic", lambda: now)
    line = ProgressLine("train", 10)
    drawn = []
    for now in range(10_000):
        if line.is_due:
            line._drawn = now
            drawn.append(now)
    assert drawn[:2] == [6, 12]
    assert drawn[-1] - drawn[-2] > 190
    assert len(drawn) < 250


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_is_answered_in_one_line_and_a_second_one_stops_at_once(number, name, capfd):
    stop, trainer = GracefulStop(), L.Trainer(accelerator="cpu", logger=False)
    stop.setup(trainer, None, "fit")
    stop.on_train_start(trainer, None)
    try:
        signal.raise_signal(number)
        answer = f"{name}: stopping after this step, with a checkpoint; a second one stops at once\n"
        assert capfd.readouterr().err == answer
        with pytest.raises(SystemExit) as stopped:
            signal.raise_signal(number)
        assert stopped.value.code == 128 + number
    finally:
        stop.teardown(trainer, None, "fit")


def test_a_signal_after_the_last_step_lets_the_run_end(capfd):
    stop, checkpoint = GracefulStop(), RunCheckpoint()
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[checkpoint])
    stop.setup(trainer, None, "fit")
    stop.on_train_start(trainer, None)
    checkpoint.is_last_step = True
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        stop.teardown(trainer, None, "fit")
    assert capfd.readouterr().err == "SIGTERM: the run has done its last step and ends; a second one stops at once\n"


def test_a_signal_is_kept_if_the_terminal_is_gone(monkeypatch):
    def gone(*_: object) -> int:
        raise BrokenPipeError

    stop, trainer = GracefulStop(), L.Trainer(accelerator="cpu", logger=False)
    stop.setup(trainer, None, "fit")
    stop.on_train_start(trainer, None)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", gone)
            signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    finally:
        stop.teardown(trainer, None, "fit")


@pytest.mark.parametrize("in_terminal", [True, False], ids=["terminal", "file"])
@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "broken"])
def test_a_line_whose_stream_is_gone_is_not_drawn(monkeypatch, in_terminal, is_closed):
    reading, writing = os.pipe()
    os.close(reading)
    stream = io.TextIOWrapper(io.FileIO(writing, "w"), "utf-8", write_through=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        if is_closed:
            stream.close()
        line = ProgressLine("train", 24)
        line.in_terminal = in_terminal
        line.draw()
        line.close()
        with contextlib.suppress(BrokenPipeError):  # of what is still in the stream
            stream.close()
