"""The verdicts as one HTML file with the figures of their studies."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.claims.claims_file import RecordsSpec
from experiments.claims.judge import Judgement
from experiments.claims.records import Recorded
from experiments.claims.tables import arms_and_measures, verdicts
from experiments.comparison import figures
from experiments.comparison.arms import compared
from experiments.comparison.page import page
from experiments.comparison.tables import Table, results
from lightning_modules.common.figures import save_figure
from lightning_modules.common.files import write_text

_ORIGIN = ("status", "steps", "date", "commit", "torch", "hardware")  # columns of the records that the page shows


def write_page(
    file: Path,
    command: Sequence[str],
    judgements: Sequence[Judgement],
    studies: Mapping[str, tuple[RecordsSpec, Recorded]],
) -> None:
    """Write the page: the verdicts, then the results and a figure of each study, and the records of all runs."""
    sections: dict[str, Table | bytes | None] = {"Verdicts": _verdicts(judgements), "Numbers": _effects(judgements)}
    rows = []
    for title, (study, recorded) in studies.items():
        arms, measures = arms_and_measures(study, recorded)
        sections[title] = results(arms, measures)
        with TemporaryDirectory() as folder:
            baselines = [baseline for _, baseline in compared(arms, study.baseline)]
            figure = figures.draw_summary(arms, measures[:2], range(len(arms)), baselines)
            sections[f"{title}: each run, and means with their intervals"] = save_figure(
                figure, Path(folder, "figure.png")
            ).read_bytes()
        rows += [
            [title, run.name, *(row[column] for column in _ORIGIN)]
            for run, row in zip(recorded.runs, recorded.rows, strict=True)
        ]
    notes = [
        "Mean ± half of its 95 % interval. Comparisons of one claim are a family, corrected by Holm's procedure, but "
        "not those of a claim that all differences are within a bound."
    ]
    runs = Table(["study", "run", *_ORIGIN], rows)
    write_text(file, page(shlex.join(command), notes, sections, runs, title="Claims"))


def _verdicts(judgements: Sequence[Judgement]) -> Table:
    table = verdicts(judgements)
    rows = [[each.topic, *row, each.claim.because] for each, row in zip(judgements, table.rows, strict=True)]
    return Table(["topic", *table.header, "why not"], rows)


def _effects(judgements: Sequence[Judgement]) -> Table:
    rows = [
        [each.topic, each.claim.name, effect.what, effect.shown, effect.verdict, effect.how]
        for each in judgements
        for effect in each.effects
    ]
    return Table(["topic", "claim", "of", "value", "verdict", "interval"], rows)
