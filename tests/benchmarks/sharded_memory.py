"""What two processes with sharded weights hold between forward and backward pass in bfloat16, and how they learn.

A decoder of 12 blocks is trained with the presets `fsdp` and `ddp` on the CPU, in `bf16-mixed`. Held are gathered
weights, and copies of weights in bfloat16 that the backward pass needs (see `held_weights.py`).
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks
from held_weights import measure
from helpers import RUNS, text, write_tiny
from shared_runs import temporary_world

STEPS = 20
SETTINGS = {
    "model__init_args__n_layer": 12,
    "model__init_args__n_embd": 192,
    "model__init_args__dropout": 0.0,
    "data__init_args__batch_size": 8,
    "trainer__max_steps": STEPS,
    "trainer__val_check_interval": STEPS,
    "trainer__log_every_n_steps": 1,
}


def column(run: Path, name: str) -> list[float]:
    """Return the values of a metric of a run."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


if __name__ == "__main__":
    with temporary_world():
        Path("text.txt").write_text(text(4_000))
        write_tiny(Path("deep.yaml"), Path("text.txt"), SETTINGS)
        for name, layout in (("fsdp", forks.SHARDED), ("ddp", forks.TWO_PROCESSES)):
            words = [word for word in layout if "precision" not in word] + ["--trainer.precision=bf16-mixed"]
            ranks = forks.start_ranks(
                2,
                *("fit", "-c", "deep.yaml", *words, "--run.name", name),
                prepare=lambda rank: measure(Path(f"held_{rank}.txt")),
                output=Path(f"{name}.log"),
            )
            assert forks.wait(ranks, 600) == [0, 0], Path(f"{name}.log").read_text()[-3000:]
        for rank in range(2):
            held = json.loads(Path(f"held_{rank}.txt").read_text().splitlines()[-1])
            print(f"rank {rank}: gathered {held['units']:,} bytes, {held['n_copies']} copies in bfloat16 of", end=" ")
            print(f"{held['copies']:,} bytes, together {held['units'] + held['copies']:,}")
        for metric in ("train/loss", "val/loss"):
            sharded, whole = (column(RUNS / name, metric) for name in ("fsdp", "ddp"))
            difference = max(abs(one - two) for one, two in zip(sharded, whole, strict=True))
            print(f"{metric}: {sharded[-1]:.4f} in the last of {len(sharded)}; at most {difference:.1e} from ddp")
