"""The table of all metrics, and whether it has those that a run logged."""

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[1] / "experiments/guides/metrics.md"
_PARTS = {"SPLIT": "(val|test)", "AREA": "(seen|interpolation|extrapolation)", "SIDE": "(train|val)"}


class Row(NamedTuple):
    """A metric of the table."""

    name: str  # with placeholders
    low: float
    high: float
    topics: set[str]  # empty for all

    @property
    def pattern(self) -> re.Pattern[str]:
        """The names that the row describes: words in capitals stand for words, single capitals for numbers."""
        text = re.sub(r"[A-Z]{2,}", lambda word: _PARTS.get(word[0], r"[\w.]+"), self.name)
        return re.compile(re.sub(r"(?<=[/_])[A-Z](?![a-zA-Z])", r"\\d+", text))

    @property
    def example(self) -> str:
        """A name that the row describes."""
        text = re.sub(r"[A-Z]{2,}", lambda word: {"SPLIT": "val", "AREA": "seen"}.get(word[0], "word"), self.name)
        return re.sub(r"(?<=[/_])[A-Z](?![a-zA-Z])", "2", text)


def rows() -> Iterator[Row]:
    """Yield the metrics of the page."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            names, meaning, _, reach, topics = (cell.strip() for cell in line.strip("|").split("|"))
            assert meaning, line
            low, high = (float(end.replace("∞", "inf")) for end in reach.strip("[]()").split(", "))
            for name in re.findall(r"`([^`]+)`", names):
                yield Row(name, low, high, set() if topics == "all" else set(re.findall(r"`(\w+)`", topics)))


def faults(run: Path) -> list[str]:
    """Return the metrics in the files of a run that the page does not have, or has with another range or topic."""
    topic, known, found = run.parent.name, list(rows()), []
    for file in run.glob("metrics*.csv"):
        with file.open(newline="") as table:
            for row in csv.DictReader(table):
                for name in row.keys() - {"step", "epoch"}:
                    values = [each for each in known if each.pattern.fullmatch(name)]
                    value = float(row[name] or "nan")
                    if not any(not each.topics or topic in each.topics for each in values):
                        found.append(name)
                    elif not math.isnan(value) and not any(e.low - 1e-6 <= value <= e.high + 1e-6 for e in values):
                        found.append(f"{name}={value}")
    return sorted(set(found))
