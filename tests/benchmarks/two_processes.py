"""Two processes against one, same global batch, every offline experiment: losses, validations, tests and weights.

    python tests/benchmarks/two_processes.py [EXPERIMENT ...]

Two processes have a copy of the model each (DistributedDataParallel), and then its shards (FSDP2). Both are killed at
the first checkpoint and resumed by `--auto_resume`. Each experiment is shortened, and has no dropout, whose random
numbers depend on the rank. `EXPERIMENT` is such as `TOPIC/offline`.
"""

import csv
import inspect
import signal
import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import forks
from shared_runs import temporary_world
from shortened import length, offline_experiments, run_of, shortened

from experiments.class_paths import import_class

STEPS, EVERY = 40, 20  # optimiser steps of a run, and between two validations
FLAGS = ("--trainer.limit_val_batches=8", "--trainer.log_every_n_steps=5")
LAYOUTS = {"ddp": forks.TWO_PROCESSES, "fsdp": forks.SHARDED}


def name(experiment: Path) -> str:
    """Return the topic and the stem of an experiment."""
    return f"{experiment.parent.name}/{experiment.stem}"


def flags_without_dropout(experiment: Path) -> tuple[str, ...]:
    """Return flags that switch off the dropout of an experiment."""
    module = import_class(yaml.safe_load(experiment.read_text())["model"]["class_path"])
    return tuple(f"--model.{name}=0" for name in inspect.signature(module).parameters if name.endswith("dropout"))


def ranks(layout: str, *command: str | Path, output: Path, dies: bool = False) -> list[int]:
    """Return the exit codes of a command on one process or in a layout of two, which may die at a checkpoint."""
    if not layout:
        return forks.wait([forks.start(*command, output=output)], 600)
    prepare = (lambda _: forks.die_after_step(None)) if dies else bool
    return forks.wait(forks.start_ranks(2, *command, *LAYOUTS[layout], prepare=prepare, output=output), 600)


def fit(experiment: Path, layout: str) -> Path:
    """Train, test if there is a test split, and return the run folder."""
    # Other experiments start from the run of one process, under its own name.
    run = run_of(experiment)
    run = run.with_name(f"{run.name}_{layout}") if layout else run
    output = Path(f"{run.parent.name}_{run.name}.log")
    flags = (*shortened(experiment), *flags_without_dropout(experiment), *length(experiment, STEPS, EVERY), *FLAGS)
    command = ("fit", "-c", experiment, *flags, "--run.name", run.name, "--auto_resume")
    if layout and -signal.SIGKILL not in ranks(layout, *command, output=output, dies=True):
        sys.exit(f"{run} was not killed:\n{output.read_text()[-3000:]}")
    codes = ranks(layout, *command, output=output)
    if any(codes):
        sys.exit(f"{run} ended with {codes}:\n{output.read_text()[-3000:]}")
    tested = Path("test.log")
    if any(ranks(layout, "test", "-c", run / "config.yaml", "--ckpt_path=last", output=tested)):
        last = tested.read_text().strip().splitlines()[-1]
        if "error: " not in last:
            sys.exit(tested.read_text()[-3000:])
        print(f"{run}: {last}", file=sys.stderr)
    return run


def metrics(run: Path) -> dict[tuple[str, str], float]:
    """Return the metrics of a run and of its test by name and step, without those of speed."""
    rows: list[dict[str, str]] = []
    for file in run.glob("metrics*.csv"):
        with file.open(newline="") as text:
            rows += csv.DictReader(text)
    return {
        (column, row["step"]): float(value)
        for row in rows
        for column, value in row.items()
        if value and "/" in column and not column.startswith("perf/")
    }


def difference(one: dict[tuple[str, str], float], two: dict[tuple[str, str], float], kind: str) -> str:
    """Return the largest relative difference among the metrics of a kind, and the metric that has it."""
    names = {key for key in one.keys() | two.keys() if key[0].startswith(kind)}
    if not names:
        return "none"
    gaps = {key: abs(one[key] - two[key]) / max(abs(one[key]), 1e-12) for key in names}
    worst = max(gaps, key=gaps.get)
    return f"{gaps[worst]:.1e}" + (f" ({worst[0]}, step {worst[1]})" if gaps[worst] else "")


def gap_of_weights(one: Path, two: Path) -> str:
    """Return the largest difference between the last weights of two runs, or whether their tokenizers are the same."""
    if (one / "merges.txt").is_file():
        same = (one / "merges.txt").read_bytes() == (two / "merges.txt").read_bytes()
        return "the same merges" if same else "OTHER MERGES"
    ours, theirs = (torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (one, two))
    return f"{max((ours[key].double() - theirs[key].double()).abs().max() for key in ours):.1e}"


if __name__ == "__main__":
    wanted = sys.argv[1:]
    with temporary_world():
        print("| experiment | layout | losses of training | validation | test | weights |\n|---|---|---|---|---|---|")
        for experiment in offline_experiments():
            one = fit(experiment, "")
            for layout in LAYOUTS if not wanted or name(experiment) in wanted else ():
                two = fit(experiment, layout)
                of_metrics = [difference(metrics(one), metrics(two), kind) for kind in ("train/loss", "val/", "test/")]
                cells = (f"`{name(experiment)}`", layout, *of_metrics, gap_of_weights(one, two))
                print(f"| {' | '.join(cells)} |", flush=True)
