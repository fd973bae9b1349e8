"""The processes of a study's runs, and what a run's folder says of its result."""

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from experiments.study.journal import Attempt
from experiments.study.plan import Plan
from experiments.study.sweep_file import Sweep

_LAST_CHECKPOINT = Path("checkpoints/last.ckpt")
_OF_ANOTHER_RUN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")  # no two runs may share an id


def start_run(plan: Plan, attempt: Attempt, lock: BinaryIO) -> "Run":
    """Start a run, or resume it if it has a checkpoint; a run that is finished gets no process.

    Args:
        plan: The plan of the study.
        attempt: The run.
        lock: The study's lock. The process holds it too, so that the folder stays locked as long as a run lives.
    """
    folder, log = plan.folder / attempt.arm, plan.folder / "logs" / f"{attempt.arm}.log"
    if _summary(folder).get("status") == "finished":
        return Run(attempt, folder, log, None)
    words = plan.command(attempt.arm, attempt.settings)
    if (folder / _LAST_CHECKPOINT).is_file():
        words.append("--ckpt_path=last")
    elif folder.exists():
        shutil.rmtree(folder)  # it has nothing to resume from
    if "${args_json_file}" in plan.sweep.command:
        log.with_suffix(".json").write_text(json.dumps(attempt.settings), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_RUN}
    for name in ("project", "entity"):
        if value := getattr(plan.sweep, name):
            environment.setdefault(f"WANDB_{name.upper()}", value)
    if plan.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // plan.jobs)))
    with log.open("ab") as output:
        process = start_process(words, environment, output, lock)
    return Run(attempt, folder, log, process)


def start_process(
    words: Sequence[str], environment: dict[str, str], output: BinaryIO, lock: BinaryIO
) -> subprocess.Popen:
    """Start the process of a run.

    Args:
        words: Its command.
        environment: Its environment.
        output: File for what it prints.
        lock: File that it keeps open.
    """
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,  # Ctrl-C reaches the study alone, which signals each run once
        pass_fds=(lock.fileno(),),
    )


@dataclass
class Run:
    """A run that has been started.

    Args:
        attempt: Its arm, settings and trial.
        folder: Its folder.
        log: File with what it prints.
        process: Its process; `None` if the run had finished before.
    """

    attempt: Attempt
    folder: Path
    log: Path
    process: subprocess.Popen | None
    stopped_early: bool = False
    began: float = field(default_factory=time.monotonic)
    _seen: tuple[int, int] = (0, 0)  # by the pruner: when metrics.csv changed, and how many values it had

    def exit_code(self) -> int | None:
        """Return the exit code; `None` while the run is alive."""
        return self.process.poll() if self.process else 0

    def signal(self, kill: bool = False) -> None:
        """Tell the process to save and exit, or kill it."""
        if self.process:
            (self.process.kill if kill else self.process.terminate)()

    def should_stop(self, metric: str) -> bool:
        """Report the new values of a metric to the pruner; return whether it gives the run up.

        Args:
            metric: Name of the metric.
        """
        file = self.folder / "metrics.csv"
        changed = file.stat().st_mtime_ns if file.is_file() else 0
        if changed == self._seen[0]:
            return False
        values = _values(file, metric)
        n_seen, self._seen = self._seen[1], (changed, len(values))
        for i, value in enumerate(values[n_seen:], start=n_seen + 1):
            self.attempt.trial.report(value, i)
            if self.attempt.trial.should_prune():
                return True
        return False

    def result(self, sweep: Sweep) -> tuple[str | None, float | None]:
        """Return the name of the metric that the run is judged by and its best value.

        Args:
            sweep: The sweep; if it names no metric, the run is judged by the metric that it monitors.
        """
        if sweep.metric is None:
            best = _summary(self.folder).get("best") or {}
            return best.get("metric"), best.get("value")
        values = _values(self.folder / "metrics.csv", sweep.metric.name)
        return sweep.metric.name, (max if sweep.maximize else min)(values, default=None)

    def error(self, code: int) -> str | None:
        """Return why the run has failed, or `None` if it has not.

        Args:
            code: Exit code.
        """
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        if code:
            lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            return last.removeprefix("error: ") or f"exit code {code}"
        return None if self.folder.is_dir() else f"it has left no {self.folder}"


def _summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a run that has ended."""
    file = folder / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _values(metrics_csv: Path, name: str) -> list[float]:
    """Return the finite values of a metric that a run has written so far."""
    values = []
    if metrics_csv.is_file():
        with metrics_csv.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                with contextlib.suppress(KeyError, TypeError, ValueError):  # not in this row, or half-written
                    values.append(float(row[name]))
    return [value for value in values if math.isfinite(value)]
