"""Checkpoints that are written in the background: what they hold, and what waits for them."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
import torch
from helpers import BEST, LAST, RUNS, assert_same_weights

from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO

BACKGROUND = ("--trainer.plugins.background", "true")


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """Yield an event before which no checkpoint is written."""
    opened, save = threading.Event(), torch.save

    def save_later(*args: object) -> None:
        assert opened.wait(60)
        save(*args)

    monkeypatch.setattr(torch, "save", save_later)
    yield opened
    opened.set()
    AtomicCheckpointIO.wait()


def write_slowly() -> None:
    """For `prepare`: a checkpoint takes a tenth of a second, in which the training goes on."""
    save = torch.save

    def save_slowly(*args: object) -> None:
        time.sleep(0.1)
        save(*args)

    torch.save = save_slowly


def test_a_checkpoint_holds_the_weights_of_its_step(gate):
    model = torch.nn.Linear(3, 2)
    state = model.state_dict()  # with an attribute `_metadata`
    state["tied"] = model.weight.detach()
    before = model.weight.detach().clone()
    checkpoints = AtomicCheckpointIO(background=True)
    checkpoints.save_checkpoint({"state_dict": state, "loops": [(1, "a")]}, "background.ckpt")
    names = []
    checkpoints.then(lambda: names.append(Path("background.ckpt").is_file()))
    with torch.no_grad():
        model.weight += 1  # as the next step does, while the file is not there yet
    assert not Path("background.ckpt").exists()
    gate.set()
    found = AtomicCheckpointIO().load_checkpoint("background.ckpt")  # waits for it
    assert names == [True]
    assert torch.equal(found["state_dict"]["weight"], before)
    assert found["state_dict"]["tied"].data_ptr() == found["state_dict"]["weight"].data_ptr()
    assert found["loops"] == [(1, "a")]
    checkpoints.teardown()
    with torch.no_grad():
        model.weight.copy_(before)
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "loops": [(1, "a")]}, "at_once.ckpt")
    assert Path("at_once.ckpt").read_bytes() == Path("background.ckpt").read_bytes()


@pytest.mark.slow
def test_a_run_ends_with_the_files_of_one_that_waits(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(), "--run.name", "background", *BACKGROUND)

    def prepare() -> None:
        write_slowly()
        forks.signal_after_step(12, signal.SIGTERM)

    assert forked(*command, prepare=prepare) == 143
    run = RUNS / "background"
    assert AtomicCheckpointIO().load_checkpoint(run / LAST)["global_step"] == 12
    assert llm_train(*command, "--ckpt_path", "last").code == 0
    for name in (BEST, LAST):
        assert_same_weights(whole() / name, run / name)
    assert (run / BEST).samefile(run / LAST) == (whole() / BEST).samefile(whole() / LAST)
    assert (run / "model/model.safetensors").read_bytes() == (whole() / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("last", [8, 16])
def test_a_write_that_fails_ends_the_run_and_the_record_names_the_file_that_is_there(
    llm_train, tiny, monkeypatch, last
):
    write = AtomicCheckpointIO._write

    def write_once(self: AtomicCheckpointIO, checkpoint: dict, path: str) -> None:
        if checkpoint["global_step"] > last:
            raise OSError(28, "No space left on device")
        write(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "_write", write_once)
    failed = llm_train("fit", "-c", tiny(), *BACKGROUND)
    assert (failed.code, failed.err.splitlines()[-1]) == (1, "error: [Errno 28] No space left on device")
    summary = json.loads((RUNS / "tiny/summary.json").read_text())
    assert (summary["status"], summary["best"]["step"]) == ("failed", last)
    assert AtomicCheckpointIO().load_checkpoint(RUNS / "tiny" / BEST)["global_step"] == last
