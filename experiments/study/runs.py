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
from typing import TYPE_CHECKING, Any, BinaryIO

from experiments.study.plan import Plan

if TYPE_CHECKING:  # optuna is slow to import
    import optuna

_LAST_CHECKPOINT = Path("checkpoints/last.ckpt")
_OF_ANOTHER_RUN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")  # no two runs may share an id


def start_process(
    words: Sequence[str], environment: dict[str, str], output: BinaryIO, lock: BinaryIO
) -> subprocess.Popen:
    """Start the process of a run, which prints to `output` and keeps `lock` open."""
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
    """One start of a run.

    Args:
        plan: The plan of the study.
        arm: Name of the run and of its folder.
        settings: Its settings.
        trial: Optuna's trial.
        process: Its process; `None` if the run had finished before.
        stopped_early: Whether the pruner has stopped it.
    """

    plan: Plan
    arm: str
    settings: dict[str, Any]
    trial: "optuna.Trial"
    process: subprocess.Popen | None = None
    stopped_early: bool = False
    began: float = field(default_factory=time.monotonic)
    _seen: tuple[int, int] = (0, 0)  # by the pruner: when metrics.csv changed, and how many values it had

    def __post_init__(self) -> None:
        self.folder = self.plan.folder / self.arm
        self._log = self.plan.folder / "logs" / f"{self.arm}.log"

    def start(self, lock: BinaryIO) -> None:
        """Start the process, which resumes the run if it has a checkpoint; a finished run gets none.

        Args:
            lock: The study's lock. The process holds it too, so that the folder stays locked as long as a run lives.
        """
        if _summary(self.folder).get("status") == "finished":
            return
        words = self.plan.command(self.arm, self.settings)
        if (self.folder / _LAST_CHECKPOINT).is_file():
            words.append("--ckpt_path=last")
        elif self.folder.exists():
            shutil.rmtree(self.folder)  # it has nothing to resume from
        sweep = self.plan.sweep
        if "${args_json_file}" in sweep.command:
            self._log.with_suffix(".json").write_text(json.dumps(self.settings), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_RUN}
        for name, value in (("WANDB_PROJECT", sweep.project), ("WANDB_ENTITY", sweep.entity)):
            if value is not None:
                environment.setdefault(name, value)
        if self.plan.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.plan.jobs)))
        with self._log.open("ab") as output:
            self.process = start_process(words, environment, output, lock)

    def exit_code(self) -> int | None:
        """Return the exit code; `None` while the run is alive."""
        return self.process.poll() if self.process else 0

    def stop(self, kill: bool = False) -> None:
        """Tell the process to save and exit, or kill it."""
        if self.process:
            (self.process.kill if kill else self.process.terminate)()

    def should_stop(self, metric: str) -> bool:
        """Report the new values of a metric to the pruner, and return whether the run is to be stopped."""
        file = self.folder / "metrics.csv"
        changed = file.stat().st_mtime_ns if file.is_file() else 0
        if changed == self._seen[0]:
            return False
        values = _values(file, metric)
        n_seen, self._seen = self._seen[1], (changed, len(values))
        for i, value in enumerate(values[n_seen:], start=n_seen + 1):
            self.trial.report(value, i)
            if self.trial.should_prune():
                return True
        return False

    def result(self) -> tuple[str | None, float | None]:
        """Return the name and the best value of the sweep's metric, or else of the one that the run monitors."""
        sweep = self.plan.sweep
        if sweep.metric is None:
            best = _summary(self.folder).get("best") or {}
            return best.get("metric"), best.get("value")
        values = _values(self.folder / "metrics.csv", sweep.metric.name)
        return sweep.metric.name, (max if sweep.maximize else min)(values, default=None)

    def error(self, code: int) -> str | None:
        """Return why a run with this exit code has failed, or `None` if it has not."""
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        if code:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
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
