"""Runs as `compare` reads them, from their folders or from Weights & Biases."""

import csv
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from experiments.errors import UserError

FINISHED = "finished"
UNFINISHED = "unfinished"  # there is no summary yet: it still runs, or was killed
_MARKS = {"config.yaml", "environment.json", "metrics.csv"}  # one of them makes a folder a run's
# What a run is called and where it reports is not what it is.
_NO_SETTING = re.compile(r"(run|environment|trainer\.logger|trainer\.default_root_dir)(\.|$)")
_SEEDS = ("seed", "seed_everything")
_MONITOR = re.compile(r"trainer\.callbacks\.\w*Checkpoint(\.\d+)?\.monitor")
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast
_STEP = "trainer/global_step"  # optimiser steps done, in W&B's history


class Series(NamedTuple):
    """A metric's values, finite or not, in the order of the optimiser steps at which they were logged."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Run:
    """One run, whatever it was read from.

    Args:
        name: Its folder, or its address at W&B.
        status: `finished`, or how else it ended; `unfinished` where it did not.
        error: What a failed run says about it.
        settings: Its configuration without the seeds, by the keys of the command line.
        seeds: The settings that one averages over.
        modes: Metrics by which it keeps its best checkpoint, with `min` or `max`.
        metrics: All it logged.
    """

    name: str
    status: str
    error: str
    settings: dict[str, Any]
    seeds: dict[str, Any]
    modes: dict[str, str]
    metrics: dict[str, Series]


class UnreadableRunError(Exception):
    """A run folder of which something is missing or damaged."""


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among these folders and below them, each once, by path.

    Raises:
        UserError: If one of the folders does not exist, or none holds a run.
    """
    paths, found, seen = list(paths), [], set()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; give run folders, or folders that hold runs")
        for folder, below, files in os.walk(path, followlinks=True):
            is_run, is_new = bool(_MARKS.intersection(files)), os.path.realpath(folder) not in seen
            seen.add(os.path.realpath(folder))
            if is_run and is_new:
                found.append(Path(folder))
            # Not into a run: W&B keeps a config.yaml of its own there.
            below[:] = [] if is_run or not is_new else sorted(name for name in below if not name.startswith("."))
    if not found:
        raise UserError(f"there are no runs in {', '.join(map(str, paths))}; a run folder holds a config.yaml")
    return found


def read_folder(folder: Path) -> Run:
    """Reads what `run_record.py` and `MetricsCSV` have written.

    Args:
        folder: A run's folder.

    Raises:
        UnreadableRunError: If something is missing or damaged, with the reason.
    """
    try:
        with (folder / "config.yaml").open(encoding="utf-8") as file:
            config = yaml.load(file, _YAML_LOADER)
        if not isinstance(config, dict):
            raise ValueError("config.yaml holds no settings")
        summary = _read_json(folder / "summary.json") or {"status": UNFINISHED}
        metrics = _read_csv(folder / "metrics.csv")
        if summary["status"] == FINISHED and not metrics:
            raise ValueError("it has finished, and metrics.csv is missing or empty")
        # `llm-train test` leaves its result beside the fit's.
        last_step = max((int(series.steps[-1]) for series in metrics.values()), default=0)
        for name, value in (_read_json(folder / "summary_test.json") or {}).get("metrics", {}).items():
            metrics[name] = Series(np.array([last_step]), np.array([float(value)]))
        return _run(str(folder), str(summary["status"]), summary.get("error"), config, metrics)
    except FileNotFoundError as error:
        raise UnreadableRunError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as error:
        raise UnreadableRunError(" ".join(str(error).split()) or type(error).__name__) from error


def read_wandb(address: str) -> Iterator[Run]:
    """Reads runs by W&B's public API: configuration, state and the whole history.

    Args:
        address: `ENTITY/PROJECT`, or `ENTITY/PROJECT/GROUP`.

    Raises:
        UserError: If nobody is logged in, there is no such project, or it has no such runs.
    """
    import wandb

    entity, project, group, *_ = [*address.split("/", 2), "", ""]
    if not entity or not project:
        raise UserError(f"--wandb {address}: give ENTITY/PROJECT or ENTITY/PROJECT/GROUP")
    found = False
    try:
        for run in wandb.Api().runs(f"{entity}/{project}", filters={"group": group} if group else {}, lazy=False):
            if run.job_type in (None, "", "fit"):  # the other subcommands are runs of their own there
                found = True
                status = UNFINISHED if run.state == "running" else run.state
                metrics = _read_history(run.scan_history())
                yield _run(f"{entity}/{project}/{run.id} ({run.name})", status, None, run.config, metrics)
    except Exception as error:
        # W&B's errors have no common base, and where there is no such project it is a ValueError.
        if not isinstance(error, ValueError) and not type(error).__module__.startswith("wandb."):
            raise
        raise UserError(f"--wandb {address}: {error}") from error
    if not found:
        raise UserError(f"--wandb {address}: there are no training runs")


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """A configuration by the keys of the command line: `optimizer` (the class), `optimizer.lr`.

    Args:
        value: The configuration, or a part of it.
        key: Where the part stands. The classes of a list stand under their names, `trainer.callbacks.RunCheckpoint`:
            in another run they may have another place.
    """
    if isinstance(value, list) and value and all(isinstance(item, dict) and "class_path" in item for item in value):
        classes: dict[str, Any] = {}
        for item in value:
            name = item["class_path"].rsplit(".", 1)[-1]
            classes[f"{name}.{len(classes)}" if name in classes else name] = item
        value = classes
    if not isinstance(value, dict) or not value:
        return {key: value}
    flat = {}
    for name, inner in value.items():
        if name == "class_path":
            flat[key] = inner
        elif name in ("init_args", "dict_kwargs"):
            flat |= flatten(inner, key) if inner else {}
        else:
            flat |= flatten(inner, f"{key}.{name}" if key else name)
    return flat


def _run(name: str, status: str, error: str | None, config: Mapping[str, Any], metrics: Mapping[str, Series]) -> Run:
    settings = {key: value for key, value in flatten(dict(config)).items() if not _NO_SETTING.match(key)}
    # A callback's seed chooses what it looks at: a setting like any other.
    is_seed = [key.rsplit(".", 1)[-1] in _SEEDS and not key.startswith("trainer.") for key in settings]
    seeds = {key: settings.pop(key) for key in list(itertools.compress(settings, is_seed))}
    modes = {
        monitor: settings.get(f"{key.removesuffix('monitor')}mode", "min")
        for key, monitor in settings.items()
        if monitor and _MONITOR.fullmatch(key)
    }
    return Run(name, status, error or "", settings, seeds, modes, dict(metrics))


def _read_csv(file: Path) -> dict[str, Series]:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]  # what follows the last line break is half written
    header = next(csv.reader(lines), ["step"])
    for line, row in enumerate(lines[1:], start=2):
        if row.count(",") != len(header) - 1:
            raise ValueError(f"{file.name}, line {line}: {row.count(',') + 1} values for {len(header)} columns")
    if header[0] != "step":
        raise ValueError(f"{file.name}: its first column is {header[0]!r} and not 'step'")
    # Only the names of metrics can hold commas, so the numbers are split at once, which is four times as fast.
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
            number = float(value) if value in ("NaN", "Infinity", "-Infinity") else value  # JSON has no word for them
            if isinstance(number, int | float) and not name.startswith("_") and name not in (_STEP, "epoch"):
                metrics[name].append((int(row[_STEP]), float(number)))
    return {name: _series(*map(np.array, zip(*logged, strict=True))) for name, logged in metrics.items()}


def _series(steps: np.ndarray, values: np.ndarray) -> Series:
    """What is logged again, by a resumed run, takes the place of what it had logged before."""
    in_order, last = np.unique(steps[::-1], return_index=True)
    return Series(in_order, values[::-1][last])


def _read_json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
