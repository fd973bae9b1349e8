"""SIGKILL at 20 random moments across all offline experiments, then `--auto_resume`: are the final weights the same?

They are compared with those of a run that was not killed. Each run is a copy of this process, and kills itself at a
random moment of its training; some wait for a moment in which a checkpoint is written, or a validation is going on.
The functions that the main thread was in tell what the run was doing.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks
from shared_runs import temporary_world
from shortened import length, offline_experiments, run_of, shortened

KILLS = 20
STEPS, EVERY = 20, 5  # optimiser steps of a run, and between two validations
DOING = {
    "save_checkpoint": "writing a checkpoint",
    "on_run_end": "ending a validation",
    "validation_step": "validating",
}
WAIT_FOR = ["", "", "", "writing a checkpoint", "validating"]  # in turn; an empty text: anything


def doing() -> str:
    """Return what the main thread is doing."""
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        if frame.f_code.co_name in DOING:
            return DOING[frame.f_code.co_name]
        frame = frame.f_back
    return "training"


def strike(seconds: float, wait_for: str, note: Path) -> None:
    """Kill this process some time after its training has begun."""
    from lightning_modules.runtime.reproducible import ReproducibleSteps

    begin = ReproducibleSteps.on_train_start

    def wait_and_kill() -> None:
        time.sleep(seconds)
        while wait_for not in doing():
            time.sleep(0.0005)
        note.write_text(doing())
        os.kill(os.getpid(), signal.SIGKILL)

    def begin_and_wait(self: ReproducibleSteps, *args: object) -> None:
        begin(self, *args)
        threading.Thread(target=wait_and_kill, daemon=True).start()

    ReproducibleSteps.on_train_start = begin_and_wait


def fit(experiment: Path, run: str, *flags: str, **how: object) -> int:
    """Train, and return the exit code."""
    command = (
        "fit",
        "-c",
        experiment,
        *shortened(experiment),
        *length(experiment, STEPS, EVERY),
        *flags,
        "--run.name",
        run,
    )
    return forks.wait([forks.start(*command, output=Path(f"{run}.log"), **how)], 600)[0]


def same(one: Path, two: Path) -> bool:
    """Return whether the last weights of two runs are the same to the bit, and their tokenizers if they have one."""
    ours, theirs = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two))
    merges = [(run / "merges.txt").read_bytes() for run in (one, two) if (run / "merges.txt").is_file()]
    return len(set(merges)) <= 1 and all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    draw = random.Random(0)
    with temporary_world():
        experiments, seconds = offline_experiments(), {}
        for experiment in experiments:  # whole runs, under the names by which others read them
            run = run_of(experiment)
            if fit(experiment, run.name):
                sys.exit(f"{run} failed:\n{Path(f'{run.name}.log').read_text()[-3000:]}")
            seconds[experiment] = json.loads((run / "summary.json").read_text())["seconds"]
        print("| experiment | killed after | while | weights after the resume |\n|---|---|---|---|", flush=True)
        right, note = 0, Path("note.txt")
        for number, experiment in zip(range(KILLS), itertools.cycle(experiments), strict=False):
            name, whole = f"killed_{number}", run_of(experiment)
            after = draw.uniform(0, 0.7 * seconds[experiment])
            wait_for = WAIT_FOR[number % len(WAIT_FOR)]
            # A run that was finished before the kill is run again, and killed earlier, whatever it is doing.
            while (
                code := fit(experiment, name, prepare=lambda a=after, w=wait_for: strike(a, w, note)) + signal.SIGKILL
            ):
                if code != signal.SIGKILL:
                    sys.exit(f"{name} failed:\n{Path(f'{name}.log').read_text()[-3000:]}")
                shutil.rmtree(whole.with_name(name))
                after, wait_for = after / 2, ""
            again = fit(experiment, name, "--auto_resume")
            if again:
                print(Path(f"{name}.log").read_text()[-3000:], file=sys.stderr)
            equal = again == 0 and same(whole, whole.with_name(name))
            right += equal
            verdict = "same" if equal else f"OTHER ({again})"
            cells = (f"`{experiment.parent.name}/{experiment.stem}`", f"{after:.1f} s", note.read_text(), verdict)
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{right} of {KILLS} the same, bit for bit")
