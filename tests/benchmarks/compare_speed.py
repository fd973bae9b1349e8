"""Time and memory of `llm-train compare` on 200 generated runs of 1,000 rows; prints a Markdown table.

Run as `python tests/benchmarks/compare_speed.py`, best on an idle machine: under a minute. Start-up is what
`llm-train compare --help` takes: the interpreter, NumPy and SciPy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
TINY = next((ROOT / "tests").glob("*/tiny.yaml"))
METRICS = ("train/loss", "train/grad_norm", "lr", "val/loss", "val/perplexity", "val/bits_per_byte", "val/accuracy")
SEEDS = 5


def write_runs(folder: Path, n_runs: int, n_rows: int) -> None:
    """Write run folders with the configuration of a real run and random metrics in every row, five seeds an arm."""
    config = command("fit", "-c", str(TINY), "--print_config").stdout
    rng = np.random.default_rng(0)
    for number in range(n_runs):
        run = folder / f"dropout={number // SEEDS / 100},seed={number % SEEDS}"
        run.mkdir()
        lines = []
        for line in config.splitlines():
            key = line.split(":")[0]
            value = {"seed_everything": number % SEEDS, "    dropout": number // SEEDS / 100}.get(key)
            lines.append(line if value is None else f"{key}: {value}")
        (run / "config.yaml").write_text("\n".join(lines))
        (run / "summary.json").write_text(json.dumps({"status": "finished"}))
        curves = 3 + rng.normal(size=(n_rows, len(METRICS))) + 5 / np.arange(1, n_rows + 1)[:, None]
        rows = (f"{10 * step},0,{','.join(map(repr, row))}" for step, row in enumerate(curves.tolist(), start=1))
        (run / "metrics.csv").write_text("\n".join([f"step,epoch,{','.join(METRICS)}", *rows]) + "\n")


def command(*args: str) -> subprocess.CompletedProcess[str]:
    """Run `llm-train` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *args], env=environment, stdout=subprocess.PIPE, text=True
    )
    done.check_returncode()
    return done


def measure(*args: str) -> tuple[float, float, float]:
    """Return the wall time and the processor time of a command in seconds, and its peak memory in MiB."""
    start = time.perf_counter()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "experiments", *args],
        os.environ | {"PYTHONPATH": str(ROOT)},
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    assert status == 0, f"llm-train {' '.join(args)} failed"
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Measure start-up and comparison in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder), options.runs, options.rows)
        rounds = []
        for _ in range(options.rounds):
            start_up, start_up_cpu, _ = measure("compare", "--help")
            whole, whole_cpu, peak = measure("compare", folder)
            rounds.append((start_up, whole, whole - start_up, whole_cpu - start_up_cpu, peak))
    print(f"{options.runs} runs of {options.rows:,} rows, {len(METRICS)} metrics, {options.rounds} rounds\n")
    print("| | median | range |\n|---|---|---|")
    names = (
        "start-up, s", "whole command, s", "after start-up, s", "after start-up, s of processor", "peak memory, MiB",
    )  # fmt: skip
    for name, values in zip(names, zip(*rounds, strict=True), strict=True):
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |")


if __name__ == "__main__":
    main()
