"""Runs, read from their folders or from Weights & Biases."""

import csv
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.errors import UserError
from experiments.study.names import last_part
from experiments.yaml_files import numbered_keys, read_yaml
from lightning_modules.common import run_files
from lightning_modules.common.files import complete_lines, read_json

FINISHED = "finished"
CONFIG = "config"  # a setting of the runs of a study: the file that is merged over the configuration, by its stem
UNFINISHED = "unfinished"  # without a summary: the run is alive, or was killed
_MARKS = {run_files.CONFIG, run_files.ENVIRONMENT, run_files.METRICS}  # of a run, also of a damaged or a copied one
_OF_EVALUATION = re.compile(r"config_(validate|test|predict)\.yaml")
_NO_SETTING = re.compile(r"(run|environment|trainer\.logger|trainer\.default_root_dir)(\.|$)")  # names and places
SEEDS = ("seed", "seed_everything")
_FILE_OF_ARM = re.compile(r"(?:^|[/(,])config=([^,/()+]+)")  # in the name of an arm
_MONITOR = re.compile(r"trainer\.callbacks\.\w*Checkpoint(\.\d+)?\.monitor")
# What a resumed run may change without an effect on what it learns: paths of what was moved, how and where it computes.
_NO_EFFECT = re.compile(
    r"data\.|model\.(?!.*dropout)|allow$|trainer\.(accelerator|devices|num_nodes|strategy|log_every_n_steps|enable_\w+"
    r"|num_sanity_val_steps|profiler|benchmark|limit_(test|predict)_batches)(\.|$)"
)
_LENGTH = re.compile(r"trainer\.max_\w+")  # has an effect if the schedule depends on it
_STEP = "trainer/global_step"  # optimiser steps done, in W&B's history


class Series(NamedTuple):
    """The values of a metric, finite or not, in the order of the optimiser steps at which they were logged."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class RunResult:
    """One run."""

    name: str  # its folder, or its address in W&B
    status: str  # FINISHED, UNFINISHED, or another status from its summary
    error: str  # of a failed run
    settings: dict[str, Any]  # without the seeds, by the keys of the command line
    seeds: dict[str, Any]
    modes: dict[str, Literal["min", "max"]]  # of the metrics by which it keeps its best checkpoint
    metrics: dict[str, Series]
    resumed: dict[str, str] = field(default_factory=dict)  # settings of which it has had several values, in words

    @property
    def last_step(self) -> int:
        """The last step at which it has logged something."""
        return max((int(series.steps[-1]) for series in self.metrics.values()), default=0)

    @property
    def changes(self) -> str:
        """What the run was resumed with, in one text: `optimizer.lr 0.003 until step 60 then 0.001`."""
        return ", ".join(f"{key} {values}" for key, values in self.resumed.items())

    @property
    def seed(self) -> str:
        """The seeds in one text, by which runs of different arms are paired."""
        seeds = {key: value for key, value in self.seeds.items() if value is not None}
        return str(next(iter(seeds.values()))) if len(seeds) == 1 else json.dumps(seeds, sort_keys=True)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the run folders among these folders and below them, each once."""
    paths, found, seen = list(paths), [], set()
    for path in paths:
        if path.is_file():
            raise UserError(f"{path}: is a file; give the folder of its run, {path.parent}")
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; give run folders, or folders that hold runs")
        for folder, below, files in os.walk(path, followlinks=True):
            is_run, is_new = bool(_MARKS.intersection(files)), os.path.realpath(folder) not in seen
            seen.add(os.path.realpath(folder))
            if is_run and is_new and not _is_evaluation(files):
                found.append(Path(folder))
            # Do not search runs: W&B keeps a config.yaml of its own in each.
            below[:] = [] if is_run or not is_new else sorted(name for name in below if not name.startswith("."))
    if not found:
        raise UserError(f"there are no runs in {', '.join(map(str, paths))}; a run folder holds a config.yaml")
    return found


def _is_evaluation(files: Iterable[str]) -> bool:
    """Return whether these are the files of `validate`, `test` or `predict` alone, with which nothing was trained."""
    of_training = {run_files.CONFIG, run_files.METRICS}
    return any(_OF_EVALUATION.fullmatch(name) for name in files) and not of_training.intersection(files)


def read_folder(folder: Path) -> RunResult:
    """Read the folder of a run; raise a `UserError` if something is missing or damaged."""
    try:
        config = read_yaml(folder / run_files.CONFIG)
        if not isinstance(config, dict):
            raise ValueError("config.yaml holds no settings")
        summary = read_json(folder / run_files.SUMMARY, {"status": UNFINISHED})
        metrics = _read_csv(folder / run_files.METRICS)
        if summary["status"] == FINISHED and not metrics:
            raise ValueError("it has finished, and metrics.csv is missing or empty")
        # The result of `llm-train test` is in a file of its own.
        last_step = max((int(series.steps[-1]) for series in metrics.values()), default=0)
        tested = read_json(folder / run_files.of_command(run_files.SUMMARY, "test"), {})
        for name, value in tested.get("metrics", {}).items() if tested.get("status") == FINISHED else ():
            metrics[name] = Series(np.array([last_step]), np.array([math.nan if value is None else float(value)]))
        sessions = read_json(folder / run_files.ENVIRONMENT, [])
        return _run(str(folder), str(summary["status"]), summary.get("error"), config, metrics, sessions)
    except FileNotFoundError as error:
        raise UserError(f"{Path(error.filename).name} is missing") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"its files have not the form of a run's ({type(error).__name__}: {error})") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error


def read_wandb(address: str) -> list[RunResult]:
    """Return the runs of `ENTITY/PROJECT` or `ENTITY/PROJECT/GROUP`, each with its whole history, from W&B's API."""
    import wandb

    entity, project, group, *_ = [*address.split("/", 2), "", ""]
    if not entity or not project:
        raise UserError(f"--wandb {address}: give ENTITY/PROJECT or ENTITY/PROJECT/GROUP")
    runs = []
    try:
        for run in wandb.Api().runs(f"{entity}/{project}", filters={"group": group} if group else {}, lazy=False):
            if run.job_type in (None, "", "fit"):  # each subcommand is a run of its own in W&B
                status = UNFINISHED if run.state == "running" else run.state
                metrics = _read_history(run.scan_history())
                sessions = [run.config.get("environment") or {}]  # the last one
                name = f"{entity}/{project}/{run.id} ({run.name})"
                runs.append(_run(name, status, None, run.config, metrics, sessions))
    except Exception as error:
        # W&B's errors have no common base; that of an unknown project is a ValueError.
        if not isinstance(error, ValueError) and not type(error).__module__.startswith("wandb."):
            raise
        raise UserError(f"--wandb {address}: {error}") from error
    if not runs:
        raise UserError(f"--wandb {address}: there are no training runs")
    return runs


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return a configuration, or the part with a key, by the keys of the command line: `optimizer`, `optimizer.lr`.

    Classes in a list get their names as keys, `trainer.callbacks.RunCheckpoint`: places can differ between runs.
    """
    if isinstance(value, list) and value and all(isinstance(item, dict) and "class_path" in item for item in value):
        names = numbered_keys([item["class_path"].rsplit(".", 1)[-1] for item in value])
        value = dict(zip(names, value, strict=True))
    if not isinstance(value, dict) or not value:
        return {key: value}
    flat = {}
    for name, inner in value.items():
        if name == "class_path":
            flat[key] = inner
        elif name not in ("init_args", "dict_kwargs"):
            flat |= flatten(inner, f"{key}.{name}".removeprefix("."))
        elif inner:
            flat |= flatten(inner, key)
    return flat


def _run(
    name: str,
    status: str,
    error: str | None,
    config: Mapping[str, Any],
    metrics: Mapping[str, Series],
    sessions: Iterable[Mapping[str, Any]],
) -> RunResult:
    flat = {_printable(key): _printable(value) for key, value in flatten(dict(config)).items()}
    settings = {key: value for key, value in flat.items() if not _NO_SETTING.match(key)}
    if found := _FILE_OF_ARM.search(name):
        settings.setdefault(CONFIG, found[1])
    # A callback's seed is a setting like any other: it chooses the samples that the callback uses.
    is_seed = [key for key in settings if key.rsplit(".", 1)[-1] in SEEDS and not key.startswith("trainer.")]
    seeds = {key: settings.pop(key) for key in is_seed}
    modes = {
        monitor: settings.get(f"{key.removesuffix('monitor')}mode", "min")
        for key, monitor in settings.items()
        if monitor and _MONITOR.fullmatch(key)
    }
    shown = {_printable(metric): series for metric, series in metrics.items()}
    resumed = {_printable(key): _printable(text) for key, text in _values_in_turn(sessions).items()}
    resumed = {key: text for key, text in resumed.items() if _has_effect(key, settings)}
    settings |= resumed
    return RunResult(
        _printable(name), _printable(status), _printable(error or ""), settings, seeds, modes, shown, resumed
    )


def _values_in_turn(sessions: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the settings that a run was resumed with other values of: `0.003 until step 60 then 0.001`.

    Args:
        sessions: Entries of `environment.json`. A session takes the place of what others did after its first step.
    """
    values: dict[str, list[tuple[int, Any]]] = {}  # each with its first step
    for resumed in (session["resumed"] for session in sessions if "resumed" in session):
        step, changed = resumed["step"], resumed["changed"]
        for key in {**values, **changed}:
            before = values.get(key) or [(0, changed[key][0])]
            now = changed[key][1] if key in changed else before[-1][1]
            kept = [(first, value) for first, value in before if first < step]
            values[key] = kept if kept and kept[-1][1] == now else [*kept, (step, now)]
    return {key: _in_words(in_turn) for key, in_turn in values.items() if len(in_turn) > 1}


def _in_words(in_turn: Sequence[tuple[int, Any]]) -> str:
    ends = [*(f" until step {first}" for first, _ in in_turn[1:]), ""]
    shown = (last_part(value) if isinstance(value, str) else json.dumps(value) for _, value in in_turn)
    return " then ".join(map(add, shown, ends))


def _has_effect(key: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a setting that has changed at a step makes another run of a run with these settings."""
    if _LENGTH.fullmatch(key):
        is_constant = last_part(settings.get("lr_scheduler") or "Constant") == "Constant"
        return not is_constant or 0 < (settings.get("lr_scheduler.warmup") or 0) < 1  # a share of the length
    return not _NO_SETTING.match(key) and not _NO_EFFECT.match(key)


def _printable(value: Any) -> Any:
    """Return a value without the characters that control a terminal, if it is text."""
    if not isinstance(value, str):
        return value
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in value)


def _read_csv(file: Path) -> dict[str, Series]:
    lines = complete_lines(file) if file.is_file() else []
    header = next(csv.reader(lines), ["step"])
    for line, row in enumerate(lines[1:], start=2):
        if row.count(",") != len(header) - 1:
            raise ValueError(f"{file.name}, line {line}: {row.count(',') + 1} values for {len(header)} columns")
    if header[0] != "step":
        raise ValueError(f"{file.name}: its first column is {header[0]!r} and not 'step'")
    # Only names of metrics can contain commas, so all rows can be split at once, which is four times as fast.
    cells = ",".join(lines[1:]).split(",") if len(lines) > 1 else []
    steps = np.array([], dtype=int)
    metrics = {}
    for place, name in enumerate(header):
        column = cells[place :: len(header)]
        try:
            if name == "step":
                steps = np.array([int(cell) for cell in column])
            elif name != "epoch" and any(column):
                logged = np.array([bool(cell) for cell in column])
                metrics[name] = _series(steps[logged], np.array([float(cell) for cell in column if cell]))
        except ValueError as error:
            raise ValueError(f"{file.name}, column {name}: {error}") from error
    return metrics


def _read_history(history: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    metrics: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in history:
        if row.get(_STEP) is None:
            continue
        for name, value in row.items():
            number = float(value) if value in ("NaN", "Infinity", "-Infinity") else value  # JSON cannot express them
            if isinstance(number, int | float) and not name.startswith("_") and name not in (_STEP, "epoch"):
                metrics[name].append((int(row[_STEP]), float(number)))
    return {name: _series(*map(np.array, zip(*logged, strict=True))) for name, logged in metrics.items()}


def _series(steps: np.ndarray, values: np.ndarray) -> Series:
    """Return a series in which values that a resumed run logged again replace the earlier ones."""
    in_order, last = np.unique(steps[::-1], return_index=True)
    return Series(in_order, values[::-1][last])
