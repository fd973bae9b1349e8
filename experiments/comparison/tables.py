"""The tables of a comparison, as text, as Markdown, and as CSV files with all digits."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from experiments.comparison.arms import Arm, how_they_ended
from experiments.comparison.measures import Measure
from experiments.comparison.runs import Run
from experiments.comparison.statistics import Difference, Estimate, difference, estimate

NOTHING = "–"


class Table(NamedTuple):
    """What is written in the cells."""

    header: list[str]
    rows: list[list[str]]


def results(arms: Sequence[Arm], measures: Sequence[Measure]) -> Table:
    """A row an arm: the settings that tell it from the others, and its means with their intervals.

    Args:
        arms: All arms.
        measures: The columns.
    """
    with_left_out = any(arm.left_out for arm in arms)
    header = [*arms[0].shown, "n", *["left out"] * with_left_out, *(measure.label for measure in measures)]
    rows = []
    for arm in arms:
        row = [*arm.shown.values(), str(len(arm.runs)), *[how_they_ended(arm.left_out)] * with_left_out]
        for measure in measures:
            values = [value for _, value in values_of(arm, measure)]
            few = f" (n = {len(values)})" if 0 < len(values) < len(arm.runs) else ""
            row.append(with_interval(estimate(values)) + few if values else NOTHING)
        rows.append(row)
    return Table(header, rows)


def differences(pairs: Sequence[tuple[Arm, Arm]], measures: Sequence[Measure]) -> Table:
    """A row a measure of two arms: how far the one is from the other.

    Args:
        pairs: Each arm with the one that it is compared to.
        measures: What is compared.
    """
    rows = []
    for arm, baseline in pairs:
        for measure in measures:
            ours, theirs = values_of(arm, measure), values_of(baseline, measure)
            if ours and theirs:
                found = difference(ours, theirs)
                shown = with_interval(Estimate(found.mean, found.half_width, 0), sign="+")
                rows.append([arm.label, baseline.label, measure.label, shown, verdict(found, measure), found.how])
    return Table(["arm", "against", "metric", "difference", "verdict", "95 % interval"], rows)


def verdict(found: Difference, measure: Measure) -> str:
    """What a difference says, if its interval is on one side of zero."""
    if found.half_width is None:
        return NOTHING
    if not abs(found.mean) > found.half_width:
        return "not clear"
    if measure.mode is None:
        return "higher" if found.mean > 0 else "lower"
    return "better" if (found.mean < 0) == (measure.mode == "min") else "worse"


def values_of(arm: Arm, measure: Measure) -> list[tuple[str, float]]:
    """Seed and value of each run of an arm that has the measure."""
    return [(seed_of(run), value) for run in arm.runs if (value := measure.of(run)) is not None]


def seed_of(run: Run) -> str:
    """The seeds of a run, as they pair it with runs of other arms."""
    seeds = {key: value for key, value in run.seeds.items() if value is not None}
    if len(seeds) == 1:
        return str(next(iter(seeds.values())))
    return json.dumps(seeds, sort_keys=True)


def with_interval(found: Estimate, sign: str = "") -> str:
    """A mean to the second digit of its interval, `1.783 ± 0.012`; without an interval, to its own fourth digit.

    Args:
        found: Mean and interval.
        sign: `+` where the sign of positive means is shown.
    """
    mean, half_width, _ = found
    if half_width is None or not math.isfinite(half_width):
        return rounded(mean, 4, mean, sign)
    if half_width <= 1e-6 * abs(mean):  # runs that agree to the last digit of float32
        return f"{rounded(mean, 4, mean, sign)} ± 0"
    return f"{rounded(mean, 2, half_width, sign)} ± {rounded(half_width, 2, half_width)}"


def rounded(value: float, digits: int, like: float, sign: str = "") -> str:
    """A number rounded where another number of its kind has so many digits.

    Args:
        value: The number.
        digits: Significant digits of the other one.
        like: The other one.
        sign: `+` where the sign of positive numbers is shown.
    """
    if not math.isfinite(value) or not math.isfinite(like) or like == 0:
        return f"{value:{sign}.{digits}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(like)))
    return f"{round(value, decimals) + 0.0:{sign},.{max(0, decimals)}f}"  # + 0.0: never -0.00


def as_text(table: Table) -> str:
    """Columns under each other, for a terminal."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    lines = [table.header, ["─" * width for width in widths], *table.rows]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def as_markdown(table: Table) -> str:
    """A table for a README."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def results_csv(arms: Sequence[Arm], measures: Sequence[Measure]) -> str:
    """The results with all digits: mean, ends of the interval and number of runs of each measure."""
    parts = ("mean", "low", "high", "n")
    rows = [[*arms[0].shown, "n", "left out", *(f"{measure.label}, {part}" for measure in measures for part in parts)]]
    for arm in arms:
        row: list[object] = [*arm.shown.values(), len(arm.runs), how_they_ended(arm.left_out)]
        for measure in measures:
            values = [value for _, value in values_of(arm, measure)]
            if not values:
                row += ["", "", "", 0]
                continue
            mean, half_width, n = estimate(values)
            row += [mean, *(["", ""] if half_width is None else [mean - half_width, mean + half_width]), n]
        rows.append(row)
    return _csv(rows)


def runs_table(arms: Sequence[Arm], measures: Sequence[Measure]) -> Table:
    """A row a run, also of those that were left out."""
    rows = []
    for arm in arms:
        for run in [*arm.runs, *arm.left_out]:
            values = [measure.of(run) for measure in measures]
            shown = ["" if value is None else f"{value:.9g}" for value in values]  # all of a float32
            rows.append([*arm.shown.values(), seed_of(run), run.status, *shown, run.name])
    return Table([*arms[0].shown, "seed", "status", *(measure.label for measure in measures), "run"], rows)


def as_csv(table: Table) -> str:
    """The cells, separated by commas."""
    return _csv([table.header, *table.rows])


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
