"""Verdicts as text, and the tables of the READMEs, which are written from records.

A table stands between two comments, `<!-- claims: STUDY -->` and `<!-- end -->`. The number of a claim in running text
stands between `<!-- claim: NAME -->` and `<!-- end -->`, in one line.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from experiments.claims.claims_file import RecordsSpec
from experiments.claims.judge import Judgement
from experiments.claims.records import Recorded
from experiments.comparison.arms import Arm, arms_of, compared
from experiments.comparison.measures import Measure, mode_of
from experiments.comparison.tables import Table, as_markdown, caption, differences_of, results
from experiments.errors import UserError

_BLOCK = re.compile(r"(<!-- claims: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"(<!-- claim: (\S+) -->)(.*?)(<!-- end -->)")
_WIDTH = 80
_VERDICT = {"holds": "holds", "does not hold here": "fails", "not clear": "not clear", "no records": "no records"}


class State(NamedTuple):
    """What there is of a study."""

    study: str
    n_runs: int  # of the whole study
    n_recorded: int  # in the committed records
    n_here: int  # have finished in the folder of runs
    minutes: float | None  # of all recorded runs together, one after the other
    needs: str


def overview(states: Sequence[State]) -> str:
    """Return the studies as a table."""
    widths = (34, 5, 9, 5, 8, 28)
    lines = [_line("", ("study", "runs", "recorded", "here", "minutes", "needs"), widths), "─" * _WIDTH]
    for state in states:
        minutes = "" if state.minutes is None else str(math.ceil(state.minutes))
        numbers = (str(state.n_runs), str(state.n_recorded), str(state.n_here), minutes)
        lines.append(_line("", (state.study, *numbers, state.needs), widths))
    return "\n".join(lines)


def as_text(judgements: Sequence[Judgement]) -> str:
    """Return the verdicts as a table of 80 columns; a cross marks those that are not as expected."""
    widths = (32, 10, 22, 9)  # name, verdict, this project's number, the paper's
    lines = []
    for topic, group in groupby(judgements, key=lambda judgement: judgement.topic):
        heads = (topic, "verdict", "here", "paper")
        lines += [_line("", heads, widths), "─" * _WIDTH]
        for each in group:
            cells = (each.claim.name, _VERDICT[each.verdict], each.shown, paper_number(each))
            lines.append(_line("" if each.is_as_expected else "✗", cells, widths))
        lines.append("")
    return "\n".join(lines)


def _line(mark: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(cells, widths, strict=True)
    )
    return " ".join([f"{mark:<1}", *map(str.ljust, padded, widths)]).rstrip()


def paper_number(judgement: Judgement) -> str:
    """Return the number of the paper, if it has one."""
    source = judgement.claim.source
    return "" if source is None or source.number is None else f"{source.number:g}"


def arms_and_measures(study: RecordsSpec, recorded: Recorded) -> tuple[list[Arm], list[Measure]]:
    """Return the arms of a study and the measures of its metrics."""
    modes = {metric: mode_of(metric) for metric in study.metrics}
    last = [Measure(metric, "last", mode) for metric, mode in modes.items()]
    return arms_of(recorded.runs), [*last, *(Measure(metric, "best", modes[metric]) for metric in study.best)]


def block(name: str, study: RecordsSpec, recorded: Recorded, judgements: Sequence[Judgement]) -> str:
    """Return what stands between the comments of a study: results, differences, verdicts, and where they come from."""
    arms, measures = arms_and_measures(study, recorded)
    parts = [as_markdown(results(arms, measures))]
    if study.baseline:
        table = differences_of(compared(arms, study.baseline), measures[:1])
        parts += [as_markdown(table), *(f"{line}\n" for line in caption(table))]
    if judgements:
        parts.append(as_markdown(verdicts(judgements)))
    where = f"[records/{name}.csv](records/{name}.csv) {recorded.digest}"
    what = "The seed has no effect: one run an arm." if study.deterministic else "Mean ± half of its 95 % interval."
    parts.append(f"{what} {recorded.provenance}; {where}.\n")
    return "\n".join(parts)


def verdicts(judgements: Sequence[Judgement]) -> Table:
    """Return the verdicts with their claims and sources."""
    rows = []
    for each in judgements:
        source = each.claim.source
        paper = "" if source is None else ", ".join(filter(None, [source.paper, source.where]))
        surprise = "" if each.is_as_expected else f" (expected: {each.claim.expected})"
        rows.append([each.claim.sentence, f"{each.verdict}{surprise}", each.shown, paper_number(each), paper])
    return Table(["claim", "verdict", "here", "paper", "source"], rows)


def fill(readme: Path, table_of: Callable[[str], str], number_of: Callable[[str], str]) -> str:
    """Return the text of a README with all its tables and numbers made anew.

    Args:
        readme: The file.
        table_of: Returns the table of a study, by its name.
        number_of: Returns the number that decides a claim, by its name.

    Raises:
        UserError: If a table has no end, or its study no records.
    """
    text = readme.read_text(encoding="utf-8")
    for start, study in open_blocks(text):
        raise UserError(f"{readme}, line {start}: the table of {study} has no <!-- end -->")
    text = _NUMBER.sub(lambda found: f"{found[1]}{number_of(found[2])}{found[4]}", text)
    return _BLOCK.sub(lambda found: f"{found[1]}\n{table_of(found[2])}\n{found[4]}", text)


def open_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and study of each table without an end."""
    study, start = None, 0
    for number, line in enumerate(text.splitlines(), start=1):
        begins = re.fullmatch(r"<!-- claims: (\S+) -->", line)
        if study is not None and begins:
            yield start, study
        if begins:
            study, start = begins[1], number
        elif line == "<!-- end -->":
            study = None
    if study is not None:
        yield start, study
