"""The tables of a comparison, as text, as Markdown and as CSV."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.comparison.arms import Arm, how_they_ended
from experiments.comparison.measures import Measure
from experiments.comparison.statistics import Difference, differences, estimate

NOTHING = "–"
_UNFAIR = Difference(math.nan, None, "none: unequal numbers of validations")


class Table(NamedTuple):
    """A table whose cells are text."""

    header: list[str]
    rows: list[list[str]]


def results(arms: Sequence[Arm], measures: Sequence[Measure]) -> Table:
    """Return a row for each arm: the settings that tell it from the others, and the mean of each measure."""
    with_left_out = any(arm.left_out for arm in arms)
    header = [*arms[0].shown, "n", *["left out"] * with_left_out, *(measure.label for measure in measures)]
    rows = []
    for arm in arms:
        row = [*arm.shown.values(), str(len(arm.runs)), *[how_they_ended(arm.left_out)] * with_left_out]
        for measure in measures:
            mean, half_width, n = estimate(measure.values(arm.runs))
            few = f" (n = {n})" if n < len(arm.runs) else ""
            row.append(with_interval(mean, half_width) + few if n else NOTHING)
        rows.append(row)
    return Table(header, rows)


def differences_of(pairs: Sequence[tuple[Arm, Arm]], measures: Sequence[Measure]) -> Table:
    """Return a row for each pair of arms and each measure: the difference of the first arm from the second.

    All rows are one family. The best of many validations is better than the best of few for that reason alone, so best
    values are compared only between runs with equally many.
    """
    compared = [(arm, baseline, measure) for arm, baseline in pairs for measure in measures]
    compared = [each for each in compared if all(each[2].values(arm.runs) for arm in each[:2])]
    fair = [
        i for i, (*arms, measure) in enumerate(compared) if measure.is_fair(run for arm in arms for run in arm.runs)
    ]
    pairs_by_seed = [(measure.by_seed(arm.runs), measure.by_seed(baseline.runs)) for arm, baseline, measure in compared]
    found = dict(zip(fair, differences([pairs_by_seed[i] for i in fair]), strict=True))
    rows = []
    for i, (arm, baseline, measure) in enumerate(compared):
        each = found.get(i, _UNFAIR)
        shown = with_interval(each.mean, each.half_width, sign="+") if i in found else NOTHING
        rows.append([arm.label, baseline.label, measure.label, shown, verdict(each, measure), each.how])
    return Table(["arm", "against", "metric", "difference", "verdict", "interval"], rows)


def caption(differences: Table) -> list[str]:
    """Return how many comparisons a table has, and how they were corrected."""
    n = sum(not row[-1].startswith("none") for row in differences.rows)
    if n == 0:
        return []
    if n == 1:
        return ["One comparison, at a level of 5 %."]
    return [f"{n} comparisons, corrected together by Holm's procedure."]


def verdict(found: Difference, measure: Measure) -> str:
    """Return whether an arm is better; that is clear if zero is not in the interval of the difference."""
    if found.half_width is None:
        return NOTHING
    if not abs(found.mean) > found.half_width:
        return "not clear"
    if measure.mode is None:
        return "higher" if found.mean > 0 else "lower"
    return "better" if (found.mean < 0) == (measure.mode == "min") else "worse"


def with_interval(mean: float, half_width: float | None, sign: str = "") -> str:
    """Return a mean to the second digit of its interval, `1.783 ± 0.012`, or to its own fourth digit without one.

    Beside a wider interval, a mean keeps two digits of its own, if it has them before the decimal point:
    `1,500 ± 16,000`. The sign `+` shows the sign of positive means too.
    """
    if half_width is None or not math.isfinite(half_width):
        return _rounded(mean, 4, mean, sign)
    like = min(half_width, max(abs(mean), 10.0))
    return f"{_rounded(mean, 2, like, sign)} ± {_rounded(half_width, 2, half_width)}"


def _rounded(value: float, digits: int, like: float, sign: str = "") -> str:
    """Return a number with as many decimals as another one needs to show this many significant digits."""
    if not math.isfinite(value) or not math.isfinite(like) or like == 0:
        return f"{value:{sign}.{digits}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(like)))
    return f"{round(value, decimals) + 0.0:{sign},.{max(0, decimals)}f}"  # + 0.0: never -0.00


def as_text(table: Table) -> str:
    """Return a table with aligned columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    lines = [table.header, ["─" * width for width in widths], *table.rows]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def as_markdown(table: Table) -> str:
    """Return a table in Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def results_with_all_digits(arms: Sequence[Arm], measures: Sequence[Measure]) -> Table:
    """Return mean, ends of the interval and number of runs for each arm and each measure."""
    parts = ("mean", "low", "high", "n")
    header = [*arms[0].shown, "n", "left out", *(f"{measure.label}, {part}" for measure in measures for part in parts)]
    rows = []
    for arm in arms:
        row = [*arm.shown.values(), str(len(arm.runs)), how_they_ended(arm.left_out)]
        for measure in measures:
            mean, half_width, n = estimate(measure.values(arm.runs))
            ends = ["", ""] if half_width is None else [str(mean - half_width), str(mean + half_width)]
            row += [str(mean) if n else "", *ends, str(n)]
        rows.append(row)
    return Table(header, rows)


def runs_table(arms: Sequence[Arm], measures: Sequence[Measure]) -> Table:
    """Return a row for each run, also for those that are left out of the means."""
    rows = []
    for arm in arms:
        for run in [*arm.runs, *arm.left_out]:
            values = [measure.of(run) for measure in measures]
            shown = ["" if value is None else f"{value:.9g}" for value in values]  # all digits of a float32
            rows.append([*arm.shown.values(), run.seed, run.status, *shown, run.name])
    return Table([*arms[0].shown, "seed", "status", *(measure.label for measure in measures), "run"], rows)
