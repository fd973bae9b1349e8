"""The plan of a study, and its runs: their commands, their folders and their results."""

import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from experiments import names
from experiments.errors import UserError
from experiments.study.names import folder_name
from experiments.study.sweep_file import Sweep
from experiments.yaml_files import load_yaml, read_yaml, texts_in
from lightning_modules.common import run_files
from lightning_modules.common.files import complete_lines, read_json

if TYPE_CHECKING:  # optuna is slow to import
    import optuna

LOGS = "logs"  # in the folder of a study

_OF_ANOTHER_RUN = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")  # no two runs may share an id
# In the output of a run: a mistake, or the exception below a traceback.
_ERROR = re.compile(r"^(?:error: |Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(?=\S))(.*)", re.MULTILINE)


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
        words = self.sweep.words(settings, self.settings_file(arm))
        return [*words, *self.flags, *(f"--run.{key}={value}" for key, value in place.items())]

    def files(self) -> dict[str, str]:
        """Return the configuration files of the runs, and those that these name, each with a digest of its content."""
        swept = self.sweep.distributions.get(("config",))
        words = [*self.sweep.words({}, Path()), *self.flags]
        given = [value for flag, value in _flags(words) if flag in names.FILE_FLAGS]
        given += map(str, (swept.values or [swept.value]) if swept else [])
        found: dict[str, str] = {}
        left = [file for name in given if (file := names.find(name))]
        while left:
            file = left.pop()
            written, content = file.read_bytes(), None
            # What a configuration names may be another file, or have keys that JSON has not.
            with contextlib.suppress(UserError, TypeError):
                content = json.loads(json.dumps(read_yaml(file), default=str))
                written = json.dumps(content, sort_keys=True).encode()
            found[str(file)] = hashlib.sha256(written).hexdigest()
            named = (file.parent / text for text in texts_in(content) if text.endswith((".yaml", ".yml")))
            left += [file for file in named if file.is_file() and str(file) not in found]
        return found

    def settings_file(self, arm: str) -> Path:
        """Return the file of the settings of a run, which is there if the command has `${args_json_file}`."""
        return self.folder / LOGS / f"{arm}.json"


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
    for flag, value in _flags([*sweep.words({}, Path()), *flags]):
        if flag in names.FILE_FLAGS:
            config = _config(sweep, value)
            model = config.get("model")
            class_path = str(model.get("class_path") if isinstance(model, dict) else model)
            if "." in class_path:
                place["topic"] = class_path.split(".")[-2]
            own = config.get("run")
            place |= {key: given for key, given in own.items() if given is not None} if isinstance(own, dict) else {}
        elif flag in ("--run.root", "--run.topic"):
            place[flag.removeprefix("--run.")] = value
    if "topic" not in place:
        raise UserError(f"{sweep.path}: its command has no `-c FILE` with a model; add --run.topic=NAME to it")
    return Path(place["root"]) / place["topic"] / folder_name(name or sweep.name or sweep.path.stem)


def trainer_settings(sweep: Sweep, words: Sequence[str]) -> dict[str, Any]:
    """Return the section `trainer:` of the command of a run, from its YAML files and its flags."""
    trainer: dict[str, Any] = {}
    for flag, value in _flags(words):
        if flag in names.FILE_FLAGS:
            section = _config(sweep, value).get("trainer")
        elif flag == "--trainer" or flag.startswith("--trainer."):
            given: Any = value
            with contextlib.suppress(yaml.YAMLError):  # a value that is not YAML is text
                given = load_yaml(value)
            key = flag.removeprefix("--trainer").removeprefix(".")
            section = {key: given} if key else given
        else:
            continue
        trainer |= section if isinstance(section, dict) else {}
    return trainer


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the flags of the command of a run; those before `fit` are of another program: `srun -c 4 llm-train fit`."""
    return names.flags(words[words.index("fit") :] if "fit" in words else words)


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


class Job(Protocol):
    """A run that a launcher has started: a process of this machine, or a job of a cluster."""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; `None` while the run is alive, or waits to be."""

    def send_signal(self, number: int) -> None:
        """Send the run a signal: SIGTERM, on which it saves and exits, or SIGKILL."""


@dataclass
class Attempt:
    """One start of a run."""

    plan: Plan
    arm: str  # name of the run and of its folder
    settings: dict[str, Any]
    trial: "optuna.Trial"
    job: Job | None = None  # none if the run had finished before
    stopped_early: bool = False  # by the pruner
    _changed: int = 0  # when metrics.csv was last read for the pruner
    n_reported: int = 0  # values that the pruner has seen
    _n_logged: int = 0  # bytes in the log, of earlier starts

    def __post_init__(self) -> None:
        self.folder = self.plan.folder / self.arm
        self.log = self.plan.folder / LOGS / f"{self.arm}.log"
        self.last_checkpoint = self.folder / run_files.checkpoint("last")
        self._metrics = self.folder / run_files.METRICS

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached its end."""
        return self._summary().get("status") == "finished"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        return self.last_checkpoint.is_file()

    @property
    def command(self) -> list[str]:
        """The command, without the flag that resumes the run."""
        return self.plan.command(self.arm, self.settings)

    @property
    def seconds(self) -> float:
        """Time since the run was started, or submitted."""
        began = self.trial.datetime_start
        return (datetime.now() - began).total_seconds() if began else 0.0

    def prepare(self) -> None:
        """Remove a folder that has nothing to resume from, and write the file of the settings if the command has it."""
        self._n_logged = self.log.stat().st_size if self.log.is_file() else 0
        if self.folder.exists() and not self.has_checkpoint:
            shutil.rmtree(self.folder)
        if "${args_json_file}" in self.plan.sweep.command:
            self.plan.settings_file(self.arm).write_text(json.dumps(self.settings), encoding="utf-8")

    def environment(self) -> dict[str, str | None]:
        """Return the variables that differ from those of this process; `None` for those to be removed."""
        changed: dict[str, str | None] = dict.fromkeys(_OF_ANOTHER_RUN)
        sweep = self.plan.sweep
        for name, value in (("WANDB_PROJECT", sweep.project), ("WANDB_ENTITY", sweep.entity)):
            if value is not None and name not in os.environ:
                changed[name] = value
        if ["-m", "experiments"] in map(list, itertools.pairwise(self.command)):
            changed |= own_package(os.environ)
        return changed

    def exit_code(self) -> int | None:
        """Return the exit code; `None` while the run is alive."""
        return self.job.poll() if self.job else 0

    def stop(self, kill: bool = False) -> None:
        """Tell the run to save and exit, or kill it."""
        if self.job:
            self.job.send_signal(signal.SIGKILL if kill else signal.SIGTERM)

    def should_stop(self) -> bool:
        """Report the new values of the sweep's metric to the pruner, and return whether the run is to be stopped."""
        changed = self._metrics.stat().st_mtime_ns if self._metrics.is_file() else 0
        if changed == self._changed:
            return False
        self._changed = changed
        for value in self._values()[self.n_reported :]:
            self.n_reported += 1
            self.trial.report(value, self.n_reported)
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
            output = self.log.read_bytes()[self._n_logged :].decode(errors="replace") if self.log.is_file() else ""
            lines = [*_ERROR.findall(output)[-1:], *output.strip().split("\n")[-1:]]
            return next((line.strip() for line in lines if line.strip()), f"exit code {code}")
        return None if self.folder.is_dir() else f"it has left no {self.folder}"

    @property
    def logged(self) -> list[str]:
        """Names of the metrics that the run has logged."""
        lines = complete_lines(self._metrics) if self._metrics.is_file() else []
        return next(csv.reader(lines), [])

    def _summary(self) -> dict[str, Any]:
        """Return the summary that a run writes at its end."""
        return read_json(self.folder / run_files.SUMMARY, {})

    def _values(self) -> list[float]:
        """Return the finite values of the sweep's metric that the run has written so far."""
        values = []
        if self._metrics.is_file():
            for row in csv.DictReader(complete_lines(self._metrics)):
                with contextlib.suppress(KeyError, TypeError, ValueError):  # not in this row
                    values.append(float(row[self.plan.sweep.metric.name]))
        return list(filter(math.isfinite, values))
