"""Tokens per second of two processes against one, on the CPU, with one thread each, in turn.

The offline pretraining on bytes, with global batches of 32 and 128 windows, which the two processes share. Two
independent runs of half as many windows show how fast the two cores of the machine are together.
"""

import csv
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks
from helpers import RUNS
from shared_runs import temporary_world

ROOT = Path(__file__).parents[2]
ROUNDS = 4
STEPS = {32: 40, 128: 15}  # by the windows of a global batch
FIT = ("fit", "-c", ROOT / "experiments" / RUNS.name / "offline.yaml", "--data.tokenizer=byte")
SHORT = ("--data.source.kinds=[topics]", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=5")


def tokens_per_second(run: str) -> float:
    """Return the median of the measurements of a run without the first, which includes the start."""
    with (RUNS / run / "metrics.csv").open(newline="") as file:
        return statistics.median([float(row["perf/tokens_per_second"]) for row in csv.DictReader(file)][1:])


def command(run: str, windows: int, steps: int) -> Sequence[str | Path]:
    """Return the command of a run with a number of windows a step."""
    return (*FIT, *SHORT, f"--trainer.max_steps={steps}", f"--data.batch_size={windows}", "--run.name", run)


def finish(processes: list[multiprocessing.Process]) -> None:
    """Wait for the processes of a job."""
    if any(forks.wait(processes, 600)):
        sys.exit("a run failed")


def measure(windows: int, number: int) -> tuple[float, float, float]:
    """Return the tokens per second of one process, of two, and of two independent runs at once."""
    one, two, *apart = (f"{name}_{windows}_{number}" for name in ("one", "two", "apart_a", "apart_b"))
    log, steps = Path("log.txt"), STEPS[windows]
    finish([forks.start(*command(one, windows, steps), output=log)])
    finish(forks.start_ranks(2, *command(two, windows, steps), *forks.TWO_PROCESSES, output=log))
    finish([forks.start(*command(run, windows // 2, steps), output=log) for run in apart])
    return tokens_per_second(one), tokens_per_second(two), sum(map(tokens_per_second, apart))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| windows a step | one process, tokens/s | two processes | two runs apart |\n|---|---|---|---|")
    with temporary_world():
        for windows in STEPS:
            rows = [measure(windows, i) for i in range(ROUNDS)]
            for one, two, apart in rows:
                shown = f"{one:,.0f} | {two:,.0f}: {two / one:.2f} times | {apart:,.0f}: {apart / one:.2f} times"
                print(f"| {windows} | {shown} |", flush=True)
            medians = [statistics.median(ratios) for ratios in zip(*((b / a, c / a) for a, b, c in rows), strict=True)]
            print(f"| {windows} | medians | {medians[0]:.2f} times | {medians[1]:.2f} times |", flush=True)
