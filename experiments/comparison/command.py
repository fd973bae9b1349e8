"""`llm-train compare`: the settings in which runs differ, and their results."""

import argparse
import shlex
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np

from experiments.comparison import figures, tables
from experiments.comparison.arms import Arm, arms_of, compared, how_they_ended
from experiments.comparison.measures import Measure, choose_metrics, measures_of, mode_of
from experiments.comparison.page import page
from experiments.comparison.runs import RunResult, find_runs, read_folder, read_wandb
from experiments.comparison.statistics import estimate
from experiments.comparison.tables import Table, as_markdown, as_text
from experiments.errors import CommandParser, UserError
from experiments.study.journal import goal_of, not_run
from lightning_modules.common.figures import save_figure
from lightning_modules.common.files import csv_text, write_text
from lightning_modules.common.messages import say

_MAX_ROWS = 30  # of a table in the terminal


def main(args: Sequence[str]) -> None:
    """Print how runs compare, and write tables, figures and a page."""
    options = _parse(args)
    runs, n_skipped = _read(options)
    arms = arms_of(runs, options.unfinished)
    counting = [run for arm in arms for run in arm.runs]
    left_out = [run for arm in arms for run in arm.left_out]
    for run in left_out:
        nothing = "" if run.metrics else ", it has logged nothing"
        say(f"left out {run.name}: {run.status}{run.error and f' ({run.error})'}{nothing}")
    if not counting:
        raise UserError(f"none of these runs has finished ({how_they_ended(left_out)}); --unfinished counts them all")

    metrics, more_metrics = choose_metrics(counting, options.metrics)
    goals = dict(filter(None, (goal_of(folder) for folder in {Path(run.name).parent for run in counting})))
    for name in (*options.maximize, *options.minimize):
        if name not in metrics:
            raise UserError(f"--maximize, --minimize: {name} is not compared; there is {', '.join(metrics)}")
    modes = {name: mode_of(name, counting, options.maximize, options.minimize, goals) for name in metrics}
    measures = [measure for name in metrics for measure in measures_of(name, modes[name], counting)]
    ranking = _rank(arms, next(measure for measure in measures if measure.is_fair(counting)))
    results = tables.results(arms, measures)
    pairs = compared(arms, options.baseline)
    differences = tables.differences_of(pairs, measures)
    folders = sorted({Path(run.name).parent for run in runs})
    absent = filter(None, (not_run(folder) for folder in folders if any(map(folder.is_relative_to, options.runs))))
    notes = [*_notes(arms, n_skipped, more_metrics), *absent, *_about(differences)]

    print(as_text(_best_rows(results, ranking)))
    if differences.rows:
        print(as_text(differences))
    print("\n".join(notes))
    files = _write(
        options.out, shlex.join(["llm-train", *args]), arms, pairs, measures, ranking, results, differences, notes
    )
    print(f"\npage    {options.out / 'index.html'}\nfiles   {', '.join(sorted(files))}")


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="llm-train compare",
        description="Compare runs: a table of the settings that differ, means and 95 % intervals of the metrics over "
        "seeds, learning curves, and a page with all of these.",
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, or folders that hold runs at any depth")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT[/GROUP]", help="read the runs from Weights & Biases instead")
    for flag, metavar, text in (
        ("--metrics", "NAME", "metrics to compare (default: monitored ones, and val/ and test/ ones of all runs)"),
        ("--baseline", "SETTING=VALUE", "compare with runs of this value and the same other settings"),
        ("--maximize", "NAME", "metrics whose large values are good"),
        ("--minimize", "NAME", "metrics whose small values are good"),
    ):
        parser.add_argument(flag, nargs="+", default=[], metavar=metavar, help=text)
    parser.add_argument("--unfinished", action="store_true", help="also count runs that failed, stopped or still run")
    parser.add_argument("--out", type=Path, help="folder to write to (default: comparison/ in the given folder)")
    options = parser.parse_args(args[1:])
    if bool(options.runs) == bool(options.wandb):
        parser.error("give either run folders or --wandb")
    if options.out is None:
        options.out = (options.runs[0] if len(options.runs) == 1 else Path()) / "comparison"
        if options.out.is_symlink():
            raise UserError(f"{options.out} is a link to {options.out.resolve()}: give --out to choose where to write")
    return options


def _read(options: argparse.Namespace) -> tuple[list[RunResult], int]:
    """Return the runs that can be read, and the number of the others."""
    if options.wandb:
        return read_wandb(options.wandb), 0
    folders, runs = find_runs(options.runs), []
    with ProcessPoolExecutor() as readers:  # reading takes most of the time if there are many runs
        for folder, reading in [(folder, readers.submit(read_folder, folder)) for folder in folders]:
            try:
                runs.append(reading.result())
            except UserError as error:
                say(f"skipped {folder}: {error}")
    if not runs:
        raise UserError(f"none of the {len(folders)} runs in {', '.join(map(str, options.runs))} can be read")
    return runs, len(folders) - len(runs)


def _rank(arms: Sequence[Arm], measure: Measure) -> list[int]:
    """Return the numbers of the arms, the best mean first and those without a mean last."""
    means = np.array([estimate(measure.values(arm.runs)).mean for arm in arms])
    return np.argsort(-means if measure.mode == "max" else means, kind="stable").tolist()


def _best_rows(results: Table, ranking: Sequence[int]) -> Table:
    if len(ranking) <= _MAX_ROWS:
        return results
    more = [f"… {len(ranking) - _MAX_ROWS} more arms", *[""] * (len(results.header) - 1)]
    return Table(results.header, [*(results.rows[number] for number in ranking[:_MAX_ROWS]), more])


def _notes(arms: Sequence[Arm], n_skipped: int, more_metrics: Sequence[str]) -> list[str]:
    left_out = [run for arm in arms for run in arm.left_out]
    notes = ["Mean ± half of the width of its 95 % interval (Student's t) over n runs that differ in the seed alone."]
    if left_out:
        n_runs = sum(len(arm.runs) for arm in arms) + len(left_out)
        notes.append(f"Left out of the means: {len(left_out)} of {n_runs} runs ({how_they_ended(left_out)}).")
    if n_skipped:
        notes.append(f"Skipped, since they cannot be read: {n_skipped}.")
    repeating = [arm.label for arm in arms if len({run.seed for run in arm.runs}) < len(arm.runs)]
    if repeating:
        notes.append(
            f"Several runs have the same seed in {'; '.join(repeating[:3])}{'; …' if repeating[3:] else ''}. "
            "They are not independent: equal ones have no interval, and the interval of others is too narrow."
        )
    ends = [(run.last_step, arm.label) for arm in arms for run in arm.runs]
    (first, shortest), (last, longest) = min(ends), max(ends)
    if first < last:
        notes.append(f"The last values are of different steps, from {first} ({shortest}) to {last} ({longest}).")
    resumed = [f"{run.name} ({run.changes})" for arm in arms for run in [*arm.runs, *arm.left_out] if run.resumed]
    if resumed:
        notes.append(
            "Runs that were resumed with other settings are arms of their own: "
            f"{'; '.join(resumed[:3])}{'; …' if resumed[3:] else '.'}"
        )
    if more_metrics:
        notes.append(f"Shown only by --metrics: {', '.join(more_metrics)}.")
    return notes


def _about(differences: Table) -> list[str]:
    lines = tables.caption(differences)
    if lines and len(differences.rows) > 1:
        lines.append(
            "Even one wrong verdict among them has a probability of about 5 %, so intervals are wider than that of a "
            "single comparison; --metrics and --baseline choose fewer."
        )
    return lines


def _write(
    folder: Path,
    command: str,
    arms: Sequence[Arm],
    pairs: Sequence[tuple[Arm, Arm]],
    measures: Sequence[Measure],
    ranking: Sequence[int],
    results: Table,
    differences: Table,
    notes: Sequence[str],
) -> list[str]:
    """Write all files and return their names."""
    drawn = [next(group) for _, group in groupby(measures, key=attrgetter("metric"))]  # the best, where there is one
    curves = figures.curves_of([measure.metric for measure in drawn], arms)
    runs = tables.runs_table(arms, measures)
    images = {"summary.png": figures.draw_summary(arms, drawn, ranking, [baseline for _, baseline in pairs])}
    if curves:
        images["curves.png"] = figures.draw_curves(curves, arms, ranking)
    else:  # of an earlier comparison
        (folder / "curves.png").unlink(missing_ok=True)
    png = {name: save_figure(figure, folder / name).read_bytes() for name, figure in images.items()}
    sections = {
        "Results": results,
        "Differences": differences if differences.rows else None,
        "Each run, and means with their intervals": png["summary.png"],
        "Learning curves: means of the arms with 95 % intervals, or thin lines of the runs": png.get("curves.png"),
    }
    texts = {
        "table.md": "\n".join([*(as_markdown(table) for table in (results, differences) if table.rows), *notes, ""]),
        "table.csv": csv_text(*tables.results_with_all_digits(arms, measures), is_foreign=True),
        "runs.csv": csv_text(*runs, is_foreign=True),
        "curves.csv": figures.curves_csv(curves, arms),
        "index.html": page(command, notes, sections, runs),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*images, *texts]
