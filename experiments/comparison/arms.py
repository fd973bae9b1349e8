"""Arms of a comparison: runs with the same settings and different seeds."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from experiments.comparison.runs import CONFIG, FINISHED, RunResult
from experiments.errors import UserError
from experiments.study.names import shortest_ending

ABSENT = object()  # value of a setting that a run does not have
_COLUMNS = ("n", "seed", "status", "run")  # of the tables; a setting has a longer name
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.\w+){2,}")  # package.module.Class


@dataclass(frozen=True)
class Arm:
    """Runs with the same settings and different seeds."""

    values: dict[str, Any]  # settings that tell the arm from the others, by their shortest names
    shown: dict[str, str]  # the same settings as tables show them
    runs: list[RunResult]  # those that the means include
    left_out: list[RunResult]  # those that have not finished or have logged nothing

    @property
    def label(self) -> str:
        """Name of the arm: `n_head=4, dropout=0.1`."""
        return ", ".join(f"{name}={value}" for name, value in self.shown.items()) or "all runs"


def telling_settings(arms: Sequence[Arm]) -> list[str]:
    """Return the names of the fewest settings that tell the arms apart."""
    names = list(arms[0].shown)
    for name in reversed(names):
        others = [other for other in names if other != name]
        if others and len({tuple(arm.shown[other] for other in others) for arm in arms}) == len(arms):
            names = others
    return names


def short_labels(arms: Sequence[Arm]) -> tuple[str, list[str]]:
    """Return a title and names of the arms for a figure: the settings that tell them apart, without quotes.

    With one or two settings, the title has them and the names are their values; with more, there is no title.
    """
    names = telling_settings(arms)
    shown = [{name: arm.shown[name].replace('"', "") for name in names} for arm in arms]
    if 1 <= len(names) <= 2:
        return ", ".join(names), [", ".join(values.values()) for values in shown]
    return "", [", ".join(f"{name}={value}" for name, value in values.items()) or "all runs" for values in shown]


def arms_of(runs: Sequence[RunResult], count_unfinished: bool = False) -> list[Arm]:
    """Group runs by the settings in which they differ, in the order of the values."""

    def counts(run: RunResult) -> bool:
        return bool(run.metrics) and (count_unfinished or run.status == FINISHED)

    keys = differing_settings(runs)
    names = {key: shortest_ending(key, [*keys, *_COLUMNS]) for key in keys}
    metrics = {metric for run in runs for metric in (*run.metrics, *run.modes)}
    shown = {key: show_values((run.settings.get(key, ABSENT) for run in runs), metrics) for key in keys}
    groups: dict[tuple[str, ...], list[RunResult]] = {}
    for run in runs:
        groups.setdefault(tuple(_identity(run.settings.get(key, ABSENT)) for key in keys), []).append(run)
    arms = [
        Arm(
            {names[key]: group[0].settings.get(key, ABSENT) for key in keys},
            {names[key]: shown[key][value] for key, value in zip(keys, identity, strict=True)},
            [run for run in group if counts(run)],
            [run for run in group if not counts(run)],
        )
        for identity, group in groups.items()
    ]
    return sorted(arms, key=lambda arm: [_order(value) for value in arm.values.values()])


def compared(arms: Sequence[Arm], baseline: Sequence[str]) -> list[tuple[Arm, Arm]]:
    """Return each arm with the one to compare it with: the arm with the baseline's values and the same other settings.

    Args:
        arms: All arms.
        baseline: `SETTING=VALUE` by the short or the whole name of the setting. Without any, the second of two arms is
            compared with the first, and more arms are not compared.
    """
    if not baseline:
        return [(arms[1], arms[0])] if len(arms) == 2 else []
    given = {}
    for text in baseline:
        name, _, value = text.partition("=")
        short = next((short for short in arms[0].shown if f".{name}".endswith(f".{short}")), None)
        if short is None:
            raise UserError(f"--baseline {name}: the runs differ in {', '.join(arms[0].shown) or 'no setting'}")
        given[short] = value
    by_settings = {tuple(arm.shown.items()): arm for arm in arms}
    others = [(arm, by_settings.get(tuple((arm.shown | given).items()))) for arm in arms]
    pairs = [(arm, other) for arm, other in others if other is not None and other is not arm]
    if not pairs:
        there = ", ".join(dict.fromkeys(f"{name}={arm.shown[name]}" for name in given for arm in arms))
        raise UserError(f"--baseline {' '.join(baseline)}: there is no other run to compare; the values are {there}")
    return pairs


def how_they_ended(runs: Iterable[RunResult]) -> str:
    """Return how many runs ended in which way: `1 failed, 2 unfinished`."""
    return ", ".join(f"{count} {status}" for status, count in sorted(Counter(run.status for run in runs).items()))


def differing_settings(runs: Sequence[RunResult]) -> list[str]:
    """Return the settings in which runs differ, without those that follow from another, as arguments from a class."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    columns = {key: [_identity(run.settings.get(key, ABSENT)) for run in runs] for key in keys}
    differing = [key for key, column in columns.items() if len(set(column)) > 1]
    if CONFIG in differing:
        differing = _named_by_their_file(differing, columns)

    def follows(key: str) -> bool:
        above = max((other for other in differing if key.startswith(f"{other}.")), key=len, default=None)
        if above is None or _identity(ABSENT) not in columns[key]:
            return False
        return len(set(zip(columns[above], columns[key], strict=True))) == len(set(columns[above]))

    return [key for key in differing if not follows(key)]


def _named_by_their_file(differing: list[str], columns: dict[str, list[str]]) -> list[str]:
    """Return the differing settings with the file of a study in place of those that it sets, if it sets several."""
    files = columns[CONFIG]
    set_by_file = [
        key for key in differing if key != CONFIG and len(set(zip(files, columns[key], strict=True))) == len(set(files))
    ]
    if not set_by_file:  # records of a study have no setting but the file
        return differing
    n_arms = len(set(zip(*(columns[key] for key in set_by_file), strict=True)))
    without = set_by_file if len(set_by_file) > 1 and n_arms == len(set(files)) else [CONFIG]
    return [key for key in differing if key not in without]


def show_values(values: Iterable[Any], metrics: Collection[str] = ()) -> dict[str, str]:
    """Return the values of a setting as in YAML, with short names of classes and paths, and numbers with few digits.

    Args:
        values: The values.
        metrics: Names of metrics, which look like paths and are shown whole.
    """
    values = {_identity(value): value for value in values}
    texts = {value for value in values.values() if isinstance(value, str)}
    n_shared = 0 if texts.intersection(metrics) else _shared_folders(texts)
    numbers = [value for value in values.values() if isinstance(value, float)]
    enough = (n for n in range(4, 17) if len({f"{number:.{n}g}" for number in numbers}) == len(set(numbers)))
    digits = next(enough, 17)

    def show(value: Any) -> str:
        if value is ABSENT:
            return "–"
        if isinstance(value, str):
            ending = value.split("/", n_shared)[-1]
            return shortest_ending(value, texts) if _DOTTED.fullmatch(value) else ending
        return f"{value:.{digits}g}" if isinstance(value, float) else json.dumps(value)

    return {identity: show(value) for identity, value in values.items()}


def _shared_folders(paths: Collection[str]) -> int:
    """Return the number of folders that several paths begin with; 0 if one of the texts is no path."""
    folders = [path.split("/")[:-1] for path in paths]
    if len(folders) < 2 or not all(folders):
        return 0
    return sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False)))


def _identity(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # 1 and 1.0 are one setting
        value = int(value)
    return "" if value is ABSENT else json.dumps(value, sort_keys=True, default=str)


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return 1, value, ""
    return (0, 0, "") if value is None or value is ABSENT else (2, 0, str(value))
