"""The plan of a study, the processes of its runs, and their results."""

import contextlib
import csv
import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import TYPE_CHECKING, Any, BinaryIO

from experiments import names
from experiments.errors import UserError
from experiments.study.names import folder_name
from experiments.study.sweep_file import Sweep
from experiments.yaml_files import read_yaml

if TYPE_CHECKING:  # optuna is slow to import
    import optuna

_LAST_CHECKPOINT = Path("checkpoints/last.ckpt")
_OF_ANOTHER_RUN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")  # no two runs may share an id


@dataclass(frozen=True)
class Plan:
    """The study that the user asks for: its sweep file, folder, flags and number of runs."""

    sweep: Sweep
    folder: Path
    flags: list[str]  # of every run
    n_runs: int
    jobs: int  # runs at a time
    seed: int  # of the draws

    def command(self, arm: str, settings: Mapping[str, Any]) -> list[str]:
        """Return the command of a run."""
        root, topic = self.folder.parent.parent, self.folder.parent.name
        place = {"root": root, "topic": topic, "study": self.folder.name, "name": arm}
        words = self.sweep.words(settings, self.folder / "logs" / f"{arm}.json")
        return [*words, *self.flags, *(f"--run.{key}={value}" for key, value in place.items())]


def number_of_runs(sweep: Sweep, at_most: int | None) -> int:
    """Return how many runs a study has. A search without end must be limited by the file or the user."""
    limits = [limit for limit in (at_most, sweep.run_cap) if limit is not None]
    if sweep.method == "grid":
        limits.append(math.prod(len(spec.grid() or ()) for spec in sweep.distributions.values()))
    if not limits:
        raise UserError(f"{sweep.path}: method {sweep.method} has no end; add run_cap: to the file, or use --runs N")
    return min(limits)


def study_folder(sweep: Sweep, flags: Sequence[str], name: str | None) -> Path:
    """Return the folder of a study, in the folder of the topic that its command trains."""
    place: dict[str, str] = {"root": "runs"}
    words = [*sweep.words({}, Path()), *flags]
    pairs = list(itertools.pairwise(words)) + [word.split("=", 1) for word in words if "=" in word]
    for flag, value in pairs:
        if flag in ("-c", "--config"):
            config = _config(sweep, value)
            model = config.get("model")
            class_path = str(model.get("class_path") if isinstance(model, dict) else model)
            if "." in class_path:
                place["topic"] = class_path.split(".")[-2]
            place |= {key: given for key, given in (config.get("run") or {}).items() if given is not None}
    place |= {flag.removeprefix("--run."): value for flag, value in pairs if flag in ("--run.root", "--run.topic")}
    if "topic" not in place:
        raise UserError(f"{sweep.path}: its command has no `-c FILE` with a model; add --run.topic=NAME to it")
    return Path(place["root"]) / place["topic"] / folder_name(name or sweep.name or sweep.path.stem)


def _config(sweep: Sweep, name: str) -> dict[str, Any]:
    config = read_yaml(names.find_or_explain(name, f"{sweep.path}: its command runs"))
    return config if isinstance(config, dict) else {}


def own_package(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables with which `python -m experiments` is this project, also in a folder with `experiments/`."""
    root = str(names.SHIPPED.parent)
    others = environment.get("PYTHONPATH", "").split(os.pathsep)
    searched = [entry for entry in others if entry and not Path(entry, "experiments").exists()]
    if "site-packages" not in root:  # an installed package is found, and its folder must not hide the standard library
        searched.insert(0, root)
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(searched)}


@dataclass
class Run:
    """One start of a run."""

    plan: Plan
    arm: str  # name of the run and of its folder
    settings: dict[str, Any]
    trial: "optuna.Trial"
    process: Popen | None = None  # none if the run had finished before
    stopped_early: bool = False  # by the pruner
    began: float = field(default_factory=time.monotonic)
    _changed: int = 0  # when metrics.csv was last read for the pruner
    _n_reported: int = 0  # values that the pruner has seen

    def __post_init__(self) -> None:
        self.folder = self.plan.folder / self.arm
        self._metrics = self.folder / "metrics.csv"
        self._log = self.plan.folder / "logs" / f"{self.arm}.log"

    def start(self, lock: BinaryIO) -> None:
        """Start the process, which resumes the run if it has a checkpoint; a finished run gets none.

        The process holds the study's lock too, so that the folder stays locked as long as a run lives.
        """
        if self._summary().get("status") == "finished":
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
        if ["-m", "experiments"] in map(list, itertools.pairwise(words)):
            environment |= own_package(environment)
        if self.plan.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.plan.jobs)))
        with self._log.open("ab") as output:
            self.process = Popen(
                words,
                env=environment,
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                process_group=0,  # Ctrl-C reaches the study alone, which signals each run once
                pass_fds=[lock.fileno()],
            )

    def exit_code(self) -> int | None:
        """Return the exit code; `None` while the run is alive."""
        return self.process.poll() if self.process else 0

    def stop(self, kill: bool = False) -> None:
        """Tell the process to save and exit, or kill it."""
        if self.process:
            (self.process.kill if kill else self.process.terminate)()

    def should_stop(self) -> bool:
        """Report the new values of the sweep's metric to the pruner, and return whether the run is to be stopped."""
        changed = self._metrics.stat().st_mtime_ns if self._metrics.is_file() else 0
        if changed == self._changed:
            return False
        self._changed = changed
        for value in self._values()[self._n_reported :]:
            self._n_reported += 1
            self.trial.report(value, self._n_reported)
            if self.trial.should_prune():
                return True
        return False

    def result(self) -> tuple[str | None, float | None]:
        """Return the name and the best value of the sweep's metric, or else of the one that the run monitors."""
        sweep = self.plan.sweep
        if sweep.metric is None:
            best = self._summary().get("best") or {}
            return best.get("metric"), best.get("value")
        return sweep.metric.name, (max if sweep.maximize else min)(self._values(), default=None)

    def error(self, code: int) -> str | None:
        """Return why a run with this exit code has failed, or `None` if it has not."""
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        if code:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            return last.removeprefix("error: ") or f"exit code {code}"
        return None if self.folder.is_dir() else f"it has left no {self.folder}"

    def _summary(self) -> dict[str, Any]:
        """Return the summary that a run writes at its end."""
        file = self.folder / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _values(self) -> list[float]:
        """Return the finite values of the sweep's metric that the run has written so far."""
        values = []
        if self._metrics.is_file():
            with self._metrics.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    with contextlib.suppress(KeyError, TypeError, ValueError):  # not in this row, or half-written
                        values.append(float(row[self.plan.sweep.metric.name]))
        return list(filter(math.isfinite, values))
