"""SIGKILL at 20 random moments across all topics, then `--auto_resume`: are the final weights those of a whole run?

Each run is a copy of this process, and strikes itself dead at a random moment of its training; some wait until a
checkpoint is being written, or a validation is going on. What it was doing is told by the functions it was in.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from two_processes import TOPICS

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks

ROOT = Path(__file__).parents[2]
KILLS = 20
SHORTER = ("--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.limit_val_batches=8")
DOING = {
    "save_checkpoint": "writing a checkpoint",
    "on_run_end": "ending a validation",
    "validation_step": "validating",
}
WAIT_FOR = ["", "", "", "writing a checkpoint", "validating"]  # in turn; nothing: whatever it is doing


def doing() -> str:
    """What the main thread is at."""
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        if frame.f_code.co_name in DOING:
            return DOING[frame.f_code.co_name]
        frame = frame.f_back
    return "training"


def strike(seconds: float, wait_for: str, note: Path) -> None:
    """Kills this process some time after its training has begun."""
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


def fit(experiment: str, run: str, *flags: str, **how: object) -> int:
    """The exit code of a run."""
    output = Path(f"{run}.log")
    flags = (*TOPICS[experiment], *(() if experiment.startswith("bpe") else SHORTER), *flags, "--run.name", run)
    command = ("fit", "-c", ROOT / f"experiments/{experiment}.yaml", *flags)
    return forks.wait([forks.start(*command, output=output, **how)], 600)[0]


def same(one: Path, two: Path) -> bool:
    """Whether the last weights of two runs are the same to the bit, and their tokenizers where they make one."""
    ours, theirs = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two))
    merges = [(run / "merges.txt").read_bytes() for run in (one, two) if (run / "merges.txt").is_file()]
    return len(set(merges)) <= 1 and all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"WANDB_MODE": "disabled"}
    sys.argv = ["llm-train"]
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        seconds = {}
        for experiment in TOPICS:  # whole runs, under the names by which others find them
            fit(experiment, experiment.split("/")[1])
            run = Path("runs") / experiment
            lines = (run / "summary.json").read_text()
            seconds[experiment] = float(lines.split('"seconds": ')[1].split(",")[0])
        print("| topic | killed after | while | weights after the resume |\n|---|---|---|---|", flush=True)
        right, note = 0, Path("note.txt")
        for number, experiment in zip(range(KILLS), itertools.cycle(TOPICS), strict=False):
            name, whole = f"killed_{number}", Path("runs") / experiment
            after = draw.uniform(0, 0.7 * seconds[experiment])
            wait_for = WAIT_FOR[number % len(WAIT_FOR)]
            # A run that was finished before it was struck is run again, and struck earlier.
            while fit(experiment, name, prepare=lambda a=after, w=wait_for: strike(a, w, note)) != -signal.SIGKILL:
                shutil.rmtree(whole.with_name(name))
                after /= 2
            again = fit(experiment, name, "--auto_resume")
            equal = again == 0 and same(whole, whole.with_name(name))
            right += equal
            verdict = "same" if equal else f"OTHER ({again})"
            print(f"| `{experiment}` | {after:.1f} s | {note.read_text()} | {verdict} |", flush=True)
    print(f"\n{right} of {KILLS} the same, bit for bit")
