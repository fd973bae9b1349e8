"""How long a training stands still for a checkpoint that is written at once, and for one in the background.

A decoder of 25 million weights writes a checkpoint of 300 MB every five steps, on two threads; the two ways take turns.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks
from helpers import RUNS, text, write_tiny

from lightning_modules.runtime.checkpoint import RunCheckpoint

ROUNDS = 3
SETTINGS = {
    "model__init_args__n_layer": 8,
    "model__init_args__n_embd": 512,
    "model__init_args__n_head": 8,
    "model__init_args__dropout": 0.0,
    "data__init_args__batch_size": 16,
    "data__init_args__block_size": 64,
    "trainer__max_steps": 20,
    "trainer__val_check_interval": 5,
    "trainer__limit_val_batches": 1,
    "trainer__log_every_n_steps": 5,
}


def time_the_saving(file: Path) -> None:
    """For `prepare`: the seconds that each `_save` and the last wait take are written to a file."""
    for name in ("_save", "wait"):
        original = getattr(RunCheckpoint, name)

        def timed(self: RunCheckpoint, *args: object, _original=original, _name: str = name) -> None:
            began = time.perf_counter()
            _original(self, *args)
            with file.open("a") as out:
                out.write(json.dumps([_name, time.perf_counter() - began]) + "\n")

        setattr(RunCheckpoint, name, timed)


if __name__ == "__main__":
    os.environ |= {"WANDB_MODE": "disabled"}
    sys.argv = ["llm-train"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("text.txt").write_text(text(4_000))
        write_tiny(Path("large.yaml"), Path("text.txt"), SETTINGS)
        for number in range(ROUNDS):
            for background in ("false", "true"):
                run = f"{background}_{number}"
                command = ("fit", "-c", "large.yaml", "--run.name", run, "--trainer.plugins.background", background)
                times = Path(f"{run}.jsonl")
                process = forks.start(
                    *command, prepare=lambda file=times: time_the_saving(file), output=Path(f"{run}.log")
                )
                process.join()
                assert process.exitcode == 0, Path(f"{run}.log").read_text()[-2000:]
                timed = [json.loads(line) for line in times.read_text().splitlines()]
                saves = [seconds for name, seconds in timed if name == "_save"]
                last = max((seconds for name, seconds in timed if name == "wait"), default=0.0)
                size = (RUNS / run / "checkpoints/last.ckpt").stat().st_size / 1e6
                whole = json.loads((RUNS / run / "summary.json").read_text())["seconds"]
                print(f"background {background}: {len(saves)} checkpoints of {size:.0f} MB", end=", ")
                print(f"median {statistics.median(saves):.2f} s ({min(saves):.2f} to {max(saves):.2f})", end=", ")
                print(f"{last:.2f} s at the end, run {whole:.1f} s", flush=True)
