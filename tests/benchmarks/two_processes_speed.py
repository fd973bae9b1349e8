"""Tokens per second of two processes against one, on the CPU, with one thread each, in turn.

The decoder of `decoder_pretrain/offline.yaml` on bytes, with a global batch of 32 windows, which the two share.
"""

import csv
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks

ROOT = Path(__file__).parents[2]
ROUNDS, STEPS = 5, 40
DATA = ("--data.tokenizer=byte", "--data.source.kinds=[topics]", "--data.batch_size=32")


def tokens_per_second(n_processes: int, number: int) -> float:
    """The median of a run's measurements but for the first, which has the start in it."""
    run = f"{n_processes}_processes_{number}"
    length = (f"--trainer.max_steps={STEPS}", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=10")
    command = ["fit", "-c", ROOT / "experiments/decoder_pretrain/offline.yaml", *DATA, *length, "--run.name", run]
    if n_processes == 2:
        command += ["-c", ROOT / "experiments/trainer/ddp.yaml", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    output = Path(f"{run}.log")
    if any(forks.wait(forks.start_ranks(n_processes, *command, output=output), 600)):
        sys.exit(output.read_text())
    with (Path("runs/decoder_pretrain") / run / "metrics.csv").open(newline="") as file:
        return statistics.median([float(row["perf/tokens_per_second"]) for row in csv.DictReader(file)][1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    sys.argv = ["llm-train"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = [(tokens_per_second(1, i), tokens_per_second(2, i)) for i in range(ROUNDS)]
    print("| round | one process, tokens/s | two processes, tokens/s | ratio |\n|---|---|---|---|")
    for number, (one, two) in enumerate(rows, start=1):
        print(f"| {number} | {one:,.0f} | {two:,.0f} | {two / one:.2f} |")
    print(f"\nMedian ratio: {statistics.median(two / one for one, two in rows):.2f}")
