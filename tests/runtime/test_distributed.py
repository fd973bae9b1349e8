"""Two processes train the model that one does, on the same global batches."""

import signal
import time
from pathlib import Path

import forks
import torch
from helpers import assert_close_weights

RUNS = Path("runs/decoder_pretrain")


def test_two_processes_train_the_same_model_as_one(llm_train, tiny):
    config = tiny(model__init_args__dropout=0.0, trainer__gradient_clip_val=0.5)
    two = forks.start_ranks(2, "fit", "-c", config, *forks.TWO_PROCESSES, "--run.name", "two")
    assert llm_train("fit", "-c", config, "--run.name", "one").code == 0
    assert forks.wait(two) == [0, 0]
    assert_close_weights(*(RUNS / run / "checkpoints/last.ckpt" for run in ("two", "one")))
    for name in ("train/loss", "train/grad_norm", "val/loss", "val/bits_per_byte", "train/tokens_seen"):
        torch.testing.assert_close(column("two", name), column("one", name), rtol=1e-4, atol=1e-5)


def column(run: str, name: str) -> torch.Tensor:
    header, *rows = [line.split(",") for line in (RUNS / run / "metrics.csv").read_text().splitlines()]
    return torch.tensor([float(row[header.index(name)]) for row in rows if row[header.index(name)]])


def test_a_signal_to_one_of_two_processes_stops_both_with_a_checkpoint(tiny):
    config = tiny(trainer__max_steps=3000, trainer__val_check_interval=3000)
    job = forks.start_anew("fit", "-c", config, *forks.TWO_PROCESSES)
    metrics = RUNS / "tiny/metrics.csv"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 143, output
    assert (RUNS / "tiny/checkpoints/last.ckpt").is_file()
    assert "--ckpt_path last" in output
