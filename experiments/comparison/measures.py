"""The numbers that are compared: the best and the last value of each metric."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.comparison.runs import RunResult
from experiments.errors import UserError, did_you_mean

Mode = Literal["min", "max"]
_MOST_METRICS = 4  # of a table, unless the user asks for more
_SMALL_IS_GOOD = "loss|perplexity|bits_per_byte|bits_per_token|error|nll|mse|rmse|mae|wer|cer"
_LARGE_IS_GOOD = (
    "accuracy|acc|f1|precision|recall|auc|auroc|bleu|rouge|exact_match|score|reward|correlation|r2|explained|selectivity"
    "|bytes_per_token|tokens_per_second|steps_per_second"
)


@dataclass(frozen=True)
class Measure:
    """One number a run: the best or the last value of a metric, or both if they are equal in every run."""

    metric: str
    kind: Literal["best", "last", "best = last"]
    mode: Mode | None  # whether small or large values are good, if that is known

    @property
    def label(self) -> str:
        """The measure as the head of a column; a metric from before the first step or after the last has one value."""
        if self.metric.startswith(("init/", "test/")):
            return self.metric
        return f"{self.metric}, {self.kind}"

    def of(self, run: RunResult) -> float | None:
        """Return the value, or `None` if the run has not logged the metric."""
        if self.metric not in run.metrics:
            return None
        values = run.metrics[self.metric].values
        if self.kind != "best" or np.isnan(values).all():
            return float(values[-1])
        return float(np.nanmin(values) if self.mode == "min" else np.nanmax(values))

    def is_fair(self, runs: Iterable[RunResult]) -> bool:
        """Return whether the values of these runs can be compared: best ones only at equal numbers of validations."""
        counts = {len(run.metrics[self.metric].values) for run in runs if self.metric in run.metrics}
        return self.kind != "best" or len(counts) <= 1

    def by_seed(self, runs: Iterable[RunResult]) -> list[tuple[str, float]]:
        """Return seed and value of each run that has logged the metric."""
        return [(run.seed, value) for run in runs if (value := self.of(run)) is not None]

    def values(self, runs: Iterable[RunResult]) -> list[float]:
        """Return the value of each run that has logged the metric."""
        return [value for _, value in self.by_seed(runs)]


def choose_metrics(runs: Sequence[RunResult], asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the metrics to compare, and those that a table leaves out unless the user asks for them.

    Unless the user asks for some, they are those that the runs monitor and the other results that all runs have.
    """
    there = list(dict.fromkeys(name for run in runs for name in run.metrics))
    for name in asked:
        if name not in there:
            hint = did_you_mean(name, there) or f" (there are {', '.join(there)})"
            raise UserError(f"--metrics {name}: no run has logged it{hint}")
    if asked:
        return list(dict.fromkeys(asked)), []

    common = [name for name in there if all(name in run.metrics for run in runs)]
    monitored = [name for run in runs for name in run.modes]
    results = [name for name in there if re.fullmatch(r"(val|test)/[^/]+", name)]
    chosen = [name for name in dict.fromkeys([*monitored, *results]) if name in common]
    if not chosen and common:
        raise UserError(f"no val/ or test/ metric is in all runs; choose with --metrics from {', '.join(common)}")
    if not chosen:
        lacking = next(run for run in runs if runs[0].metrics.keys() - run.metrics.keys())
        raise UserError(
            f"these {len(runs)} runs have no metric in common: "
            + ", ".join(f"{run.name} has {', '.join(run.metrics)}" for run in (runs[0], lacking))
        )
    return chosen[:_MOST_METRICS], chosen[_MOST_METRICS:]


def mode_of(
    metric: str,
    runs: Sequence[RunResult] = (),
    maximize: Collection[str] = (),
    minimize: Collection[str] = (),
    goals: Mapping[str, str] | None = None,
) -> Mode | None:
    """Return whether small or large values of a metric are good.

    Args:
        metric: Name of the metric.
        runs: Runs that have logged it; the best checkpoint of one is by its smallest or largest value.
        maximize: Metrics whose large values are good by the user's word, which decides.
        minimize: Metrics whose small values are good by the user's word.
        goals: Goal of the metrics of studies, `minimize` or `maximize`, which decides next. The runs are after it, and
            the name of the metric is last.
    """
    if metric in maximize or metric in minimize:
        return "max" if metric in maximize else "min"
    if goals and metric in goals:
        return "max" if goals[metric] == "maximize" else "min"
    for run in runs:
        if metric in run.modes:
            return run.modes[metric]
    by_name: dict[Mode, str] = {"min": _SMALL_IS_GOOD, "max": _LARGE_IS_GOOD}
    found = (mode for mode, words in by_name.items() if re.search(rf"(?<![a-z])({words})(?![a-z])", metric))
    return next(found, None)


def measures_of(metric: str, mode: Mode | None, runs: Sequence[RunResult]) -> list[Measure]:
    """Return the measures of a metric: best and last, or one for both.

    It is one for both if they are equal in every run, and can be compared, see `Measure.is_fair`. It is the last alone
    without a mode, and if only the last differs: the best can be that before the first step.
    """
    best, last = Measure(metric, "best", mode), Measure(metric, "last", mode)
    if mode is None:
        return [last]
    if best.is_fair(runs) and all(best.of(run) == last.of(run) for run in runs):
        return [Measure(metric, "best = last", mode)]
    if len({best.of(run) for run in runs}) == 1 < len({last.of(run) for run in runs}):
        return [last]
    return [best, last]
