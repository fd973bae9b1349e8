"""Records of a study: one CSV with a row for each run.

The columns are the settings that the study varies, the seed, the metrics, and where the run comes from: status, steps,
validations, seconds, date, commit, versions, hardware.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claims.claims_file import RecordsSpec
from experiments.comparison.measures import Measure, mode_of
from experiments.comparison.runs import FINISHED, SEEDS, RunResult, Series, read_folder
from experiments.errors import UserError
from experiments.study.journal import settings_of
from experiments.study.names import last_part
from experiments.study.sweep_file import Sweep
from lightning_modules.common import run_files
from lightning_modules.common.files import csv_text, read_json
from lightning_modules.common.messages import say

SEED = "seed"
PROVENANCE = ("status", "steps", "validations", "seconds", "date", "commit", "python", "torch", "lightning", "hardware")
_BEST = ", best"  # after the name of a metric
_DIGITS = 6  # significant ones


@dataclass(frozen=True)
class Recorded:
    """The runs of a study as their records have them."""

    runs: list[RunResult]
    rows: list[dict[str, str]]  # as in the file
    digest: str  # of the text

    @property
    def provenance(self) -> str:
        """The runs in one line: how many, when, from which commit, with which versions, on which hardware."""

        def all_of(column: str) -> str:
            values = list(dict.fromkeys(row[column] for row in self.rows if row[column]))
            return ", ".join(values if len(values) < 4 else [values[0], "…", values[-1]])

        dates = sorted(row["date"] for row in self.rows if row["date"])
        when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "no date"
        return (
            f"{len(self.rows)} {'run' if len(self.rows) == 1 else 'runs'}, {when}, commit {all_of('commit')}, "
            f"Python {all_of('python')}, torch {all_of('torch')}, Lightning {all_of('lightning')}, {all_of('hardware')}"
        )


def make_records(folder: Path, study: RecordsSpec, sweep: Sweep) -> str:
    """Return the records of the runs of a study as CSV.

    Args:
        folder: Folder of the study.
        study: What is recorded.
        sweep: The sweep file of the study.

    Raises:
        UserError: If no run has finished, one cannot be read, lacks a metric or was resumed with other settings, or the
            study is of another sweep file.
    """
    runs, settings = [], settings_of(folder, sweep)
    for name in sorted(settings):
        if not (folder / name / run_files.SUMMARY).is_file():
            say(f"left out {folder / name}: it has not ended, or its folder was removed")
            continue
        try:
            run = read_folder(folder / name)
        except UserError as error:
            raise UserError(f"{folder / name}: {error}") from error
        if run.resumed:
            raise UserError(
                f"{run.name}: was resumed with other settings ({run.changes}), so it is a run of none of them; remove "
                "the folder, and run the study again"
            )
        runs.append((run, name))
    if not any(run.status == FINISHED for run, _ in runs):
        raise UserError(f"{folder}: no run of this study has finished")
    varied = {".".join(key): key for key, spec in sweep.distributions.items() if spec.is_swept}
    keys = [key for key in varied if key not in SEEDS]
    shown = {key: _shown_settings(reduce(getitem, varied[key], settings[name]) for _, name in runs) for key in keys}
    columns = {metric: Measure(metric, "last", None) for metric in study.metrics}
    columns |= {f"{metric}{_BEST}": Measure(metric, "best", mode_of(metric)) for metric in study.best}
    rows = []
    for i, (run, name) in enumerate(runs):
        for metric in study.metrics:
            if run.status == FINISHED and metric not in run.metrics:
                raise UserError(f"{run.name}: has logged no {metric}")
        values = [shown[key][i] for key in keys]
        numbers = [_rounded(measure.of(run)) for measure in columns.values()]
        rows.append([*values, run.seed, *numbers, *_provenance(folder / name, run, study.metrics[0])])
    rows.sort(key=lambda row: [_order(cell) for cell in row[: len(keys) + 1]])
    return csv_text([*keys, SEED, *columns, *PROVENANCE], rows)


def read_records(text: str, name: str) -> Recorded:
    """Return the runs of the records in a CSV.

    Args:
        text: The text.
        name: Name of the file, for messages.
    """
    table = csv.DictReader(io.StringIO(text))
    columns = list(table.fieldnames or [])
    if SEED not in columns or columns[-len(PROVENANCE) :] != list(PROVENANCE):
        raise UserError(f"{name}: lacks columns of records; `llm-train claims --record` writes it")
    place = columns.index(SEED)
    keys, metrics = columns[:place], columns[place + 1 : -len(PROVENANCE)]
    runs, rows = [], []
    for line, row in enumerate(table, start=2):
        try:
            runs.append(_run(row, keys, metrics))
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}, line {line}: {error}") from error
        rows.append(row)
    return Recorded(runs, rows, hashlib.sha256(text.encode()).hexdigest()[:12])


def _run(row: Mapping[str, str], keys: Iterable[str], metrics: Sequence[str]) -> RunResult:
    """Return the run of a row.

    A metric has as many values as the run had validations, all unknown but for the best and the last: comparisons of
    best values look at their number.
    """
    if None in row or None in row.values():
        raise ValueError("has not as many cells as the header")
    n, steps = int(row["validations"]), int(row["steps"])
    series = {}
    for metric in metrics:
        if not metric.endswith(_BEST) and row[metric]:
            values = np.full(max(n, 1), np.nan)
            values[0] = float(row.get(f"{metric}{_BEST}") or "nan")
            values[-1] = float(row[metric]) if n > 1 or np.isnan(values[0]) else values[0]
            series[metric] = Series(np.arange(steps - len(values) + 1, steps + 1), values)
    settings = {key: _value(row[key]) for key in keys}
    name = ", ".join(f"{key}={row[key]}" for key in [*keys, SEED])
    return RunResult(name, row["status"], "", settings, {SEED: row[SEED]}, {}, series)


def _provenance(folder: Path, run: RunResult, metric: str) -> list[str]:
    summary = read_json(folder / run_files.SUMMARY, {})
    sessions = read_json(folder / run_files.ENVIRONMENT, [])
    session = sessions[-1] if sessions else {}
    packages = session.get("packages", {})
    hardware = ", ".join(dict.fromkeys(session.get("devices") or [])) or (
        f"{session.get('cpu_count')} cores of {session.get('processor')}, {session.get('threads')} in use"
    )
    n = len(run.metrics[metric].values) if metric in run.metrics else 0
    return [
        run.status, str(summary.get("step", 0)), str(n), f"{summary.get('seconds', 0):.0f}",
        str(session.get("started", ""))[:10], str(session.get("commit") or ""), str(session.get("python", "")),
        packages.get("torch", ""), packages.get("lightning", ""), hardware,
    ]  # fmt: skip


def _shown_settings(values: Iterable[Any]) -> list[str]:
    """Return the values of a setting as the records have them: texts as in the names of arms, others as in YAML.

    Texts that would be the same in the names of arms are whole.
    """
    values = list(values)
    texts = Counter(last_part(text) for text in {value for value in values if isinstance(value, str)})

    def show(value: Any) -> str:
        if not isinstance(value, str):
            return json.dumps(value)
        return last_part(value) if texts[last_part(value)] == 1 else value

    return [show(value) for value in values]


def _value(cell: str) -> Any:
    """Return the setting of a cell: a number, true, false or null, else its text."""
    try:
        value = json.loads(cell)
    except ValueError:
        return cell
    return value if value is None or isinstance(value, bool | int | float) else cell


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.{_DIGITS}g}"


def _order(cell: str) -> tuple[int, float, str]:
    value = _value(cell)
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, cell)
