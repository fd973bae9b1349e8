"""SIGTERM to a whole job, as SLURM sends it, at three moments: are there a checkpoint, exit code 143, the same weights?

The job is one process or two, with 0 or 4 workers of the loader each, all in one process group. It trains an offline
experiment and signals its group while it trains, validates, or writes a checkpoint. Then `--auto_resume` finishes it,
and its weights are compared with those of a job that was not stopped. Arguments of this script are passed on to `fit`
for the jobs that are stopped: `--trainer.plugins.background true` writes their checkpoints in the background.
"""

import itertools
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks
from kill_and_resume import doing, same
from shared_runs import temporary_world
from shortened import length, offline_experiments, run_of, shortened

STEPS, EVERY = 30, 10  # optimiser steps of a job, and between two validations
MOMENTS = ("training", "validating", "writing a checkpoint")
LAYOUTS = {1: ("--trainer.accelerator=cpu",), 2: forks.TWO_PROCESSES}


def strike(moment: str, seconds: float, note: Path) -> None:
    """For `prepare`: signal the group of this process some time after its training has begun, at such a moment."""
    from lightning_modules.runtime.reproducible import ReproducibleSteps

    begin = ReproducibleSteps.on_train_start

    def wait_and_signal() -> None:
        time.sleep(seconds)
        while doing() != moment:
            time.sleep(0.0002)
        os.killpg(os.getpgid(0), signal.SIGTERM)
        note.write_text(doing())

    def begin_and_wait(self: ReproducibleSteps, *args: object) -> None:
        begin(self, *args)
        threading.Thread(target=wait_and_signal, daemon=True).start()

    ReproducibleSteps.on_train_start = begin_and_wait  # type: ignore[method-assign]


def fit(experiment: Path, name: str, n: int, workers: int, *flags: str, moment: str = "") -> list[int]:
    """Train in a process group of its own, and return the exit codes of its processes."""

    def prepare(rank: int) -> None:
        while os.getpgrp() == parent:  # until this process is in the group of the job
            time.sleep(0.001)
        if moment and rank == 0:
            strike(moment, random.Random(name).uniform(0, 0.3), Path(f"{name}.txt"))

    parent = os.getpgrp()
    words = ("fit", "-c", experiment, *shortened(experiment), *length(experiment, STEPS, EVERY), *LAYOUTS[n], *flags)
    words = (*words, f"--data.num_workers={workers}", "--run.name", name)
    job = forks.start_ranks(n, *words, prepare=prepare, output=Path(f"{name}.log"))
    for process in job:
        os.setpgid(process.pid, job[0].pid)
    return forks.wait(job, 300)


if __name__ == "__main__":
    flags = sys.argv[1:]
    experiment = offline_experiments()[0]
    with temporary_world():
        for n in LAYOUTS:
            assert fit(experiment, f"whole_{n}", n, 0) == [0] * n, Path(f"whole_{n}.log").read_text()[-3000:]
        print("| processes | workers | signalled while | exit codes | last step | weights after the resume |")
        print("|---|---|---|---|---|---|", flush=True)
        for n, workers, moment in itertools.product(LAYOUTS, (0, 4), MOMENTS):
            name = f"{moment.replace(' ', '_')}_{n}_{workers}"
            codes = fit(experiment, name, n, workers, *flags, moment=moment)
            run, whole = (run_of(experiment).with_name(stem) for stem in (name, f"whole_{n}"))
            last = run / "checkpoints/last.ckpt"
            step = torch.load(last, weights_only=True)["global_step"] if last.is_file() else "no checkpoint"
            again = fit(experiment, name, n, workers, *flags, "--auto_resume")
            verdict = "same" if again == [0] * n and same(whole, run) else f"OTHER {again}"
            cells = (n, workers, moment, ", ".join(map(str, codes)), step, verdict)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            if codes != [143] * n:
                print(Path(f"{name}.log").read_text()[-2000:], file=sys.stderr)
