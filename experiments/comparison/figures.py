"""The figures of a comparison: learning curves, and the result of every run."""

import math
import re
from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.comparison.arms import Arm, how_they_ended, short_labels, telling_settings
from experiments.comparison.measures import Measure
from experiments.comparison.statistics import Estimate, estimate, mean_and_half_width
from lightning_modules.common.figures import integer_steps, log_scale, new_figure, smoothed, tidy
from lightning_modules.common.files import csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito (2008), which colour-blind readers can distinguish, without the pale yellow.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
_MARKERS = "osD^vPX"
_OTHERS = "#bbbbbb"
_ROWS = "#555555"  # of the arms that are compared with a baseline
_MAX_MARKED_POINTS = 30  # a curve with more points has no markers
_MAX_BANDS = 8  # with more arms, no interval is drawn
_MEAN_OF = 3  # runs, or more; the interval of two runs is too wide, so each of them is drawn
_MAX_POINTS = 300  # of a curve
_MAX_ROWS = 30
_MAX_LABEL = 54  # characters

_LOG_SCALE = 10  # ratio of the largest to the smallest value of a panel with a logarithmic axis
_CLOSE = 0.15  # part of a panel in which more than half of the arms are drawn again, closer
_SHARES = (
    "accuracy|acc|f1|precision|recall|auc|auroc|ap|rouge|rougel|bleu|exact_match|share|shares|coverage|ece|agreement"
    "|ends_with_eos|mfu"
)
_UNLIMITED = "excess|gap|cost|gain|selectivity|correlation"
_AT_LEAST_0 = "loss|nll|perplexity|bits_per_byte|bits_per_token|entropy|norm|error|mse|rmse|mae|lr|tokens|seconds|std"

Look = dict[str, Any]  # colour, marker and style of a line


class Curve(NamedTuple):
    """A metric against the step: the mean of an arm with its interval, or a single run."""

    metric: str
    arm: int
    run: str  # empty for a mean
    counts: bool
    steps: np.ndarray
    values: np.ndarray
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    of_runs: Sequence[np.ndarray] = ()  # the values of the runs of a mean


def limits_of(metric: str) -> tuple[float, float]:
    """Return the least and the largest value that a metric can have, by the words in its name."""

    def has(words: str) -> bool:
        return re.search(rf"(?<![a-z])({words})(?![a-z])", metric.lower()) is not None

    if has(_UNLIMITED):
        return -math.inf, math.inf
    return (0.0, 1.0) if has(_SHARES) else (0.0 if has(_AT_LEAST_0) else -math.inf, math.inf)


def curves_of(metrics: Sequence[str], arms: Sequence[Arm]) -> list[Curve]:
    """Return the mean of each arm at the steps that all its runs have logged, and the runs that are in no mean.

    An arm has no mean if a run of it ended before the middle of the longest one: the mean would end there too. Metrics
    that every run has logged only once are left out.
    """
    curves = []
    for metric in metrics:
        of_metric = [curve for number, arm in enumerate(arms) for curve in _curves_of_arm(metric, number, arm)]
        if any(len(curve.steps) > 1 for curve in of_metric):
            curves += of_metric
    return curves


def _curves_of_arm(metric: str, number: int, arm: Arm) -> list[Curve]:
    series = [run.metrics[metric] for run in arm.runs if metric in run.metrics]
    shared = reduce(np.intersect1d, [steps for steps, _ in series]) if len(series) >= _MEAN_OF else np.array([])
    curves = []
    if 2 * len(shared) > max((len(steps) for steps, _ in series), default=0):
        shared = shared[_thin(shared)]
        values = [logged[np.searchsorted(steps, shared)] for steps, logged in series]
        mean, half_width = mean_and_half_width(np.stack(values))
        curves.append(Curve(metric, number, "", True, shared, mean, mean - half_width, mean + half_width, values))
    for run in arm.left_out if curves else [*arm.runs, *arm.left_out]:
        if metric in run.metrics:
            steps, logged = run.metrics[metric]
            drawn = _thin(steps)
            curves.append(Curve(metric, number, run.name, run in arm.runs, steps[drawn], logged[drawn]))
    return curves


def _thin(steps: np.ndarray) -> np.ndarray:
    """Return the indices of the points to draw: all, or some at even distances, with the first and the last."""
    return np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS)).round().astype(int)


def curves_csv(curves: Sequence[Curve], arms: Sequence[Arm]) -> str:
    """Return the points of the curves as CSV."""
    rows = (
        (curve.metric, arms[curve.arm].label, curve.run, *point)
        for curve in curves
        for point in zip_longest(curve.steps, curve.values, curve.low, curve.high, fillvalue="")
    )
    return csv_text(["metric", "arm", "run", "step", "value", "low", "high"], rows, is_foreign=True)


def draw_curves(curves: Sequence[Curve], arms: Sequence[Arm], ranking: Sequence[int]) -> "Figure":
    """Draw one panel for each metric, and a closer one where most arms lie close together.

    If there are more arms than colours, the best ones are coloured.
    """
    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    looks = _looks(arms, ranking)
    drawn = {metric: [curve for curve in curves if curve.metric == metric] for metric in metrics}
    close_ups = {metric: _close_up(of_metric) for metric, of_metric in drawn.items()}
    picture, panels = _panels(len(metrics) + sum(found is not None for found in close_ups.values()))
    rest = iter(panels)
    with_bands = len(arms) <= _MAX_BANDS
    for metric, of_metric in drawn.items():
        axes = next(rest)
        _draw_metric(axes, metric, of_metric, looks, with_bands)
        if (found := close_ups[metric]) is not None:
            closer, (first, low, high) = next(rest), found
            _draw_metric(closer, metric, of_metric, looks, with_bands=False, closer=True)
            closer.set(xlim=(first, None), ylim=(low, high), ylabel=f"{metric}, closer")
    title, names = short_labels(arms)
    entries = {names[number]: look for number, look in looks.items()}
    if len(looks) < len(arms):
        entries["other arms"] = {"color": _OTHERS}
    if not all(curve.counts for curve in curves):
        entries["a run that has not finished"] = {"color": "#555555", "linestyle": ":"}
    _legend(picture, entries, title)
    return picture


def _draw_metric(
    axes: "Axes",
    metric: str,
    drawn: Sequence[Curve],
    looks: dict[int, Look],
    with_bands: bool,
    closer: bool = False,
) -> None:
    """Draw all curves of a metric, on a logarithmic axis if it has a wide range and is not drawn closer."""
    counting = [curve for curve in drawn if curve.counts]
    for curve in counting or drawn:
        _draw_curve(axes, curve, looks.get(curve.arm))
        if with_bands and _is_beyond(curve):
            for values in curve.of_runs:
                axes.plot(curve.steps, values, color=looks[curve.arm]["color"], linewidth=0.6, alpha=0.45)
    if _is_log(drawn) and not closer:
        log_scale(axes, "y")
    axes.set_ylim(axes.get_ylim())  # intervals of few seeds are very wide, and unfinished runs can be far off
    for curve in drawn:
        if not curve.counts and counting:
            _draw_curve(axes, curve, looks.get(curve.arm))
        if len(curve.low) and with_bands and not _is_beyond(curve):
            _draw_band(axes, curve, looks[curve.arm]["color"])
    integer_steps(axes, sorted({step for curve in drawn for step in curve.steps.tolist()}))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(metric)


def _is_beyond(curve: Curve) -> bool:
    """Return whether the interval of a mean reaches beyond what the metric can be; then its runs are drawn.

    Such an interval is that of too few runs for their spread, and would cover the panel.
    """
    least, most = limits_of(curve.metric)
    low, high = np.asarray(curve.low), np.asarray(curve.high)
    return bool((low < least).any() or (high > most).any())


def _draw_band(axes: "Axes", curve: Curve, color: str) -> None:
    """Draw the interval of a mean."""
    low, high = np.asarray(curve.low), np.asarray(curve.high)
    known = np.isfinite(low) & np.isfinite(high)
    axes.fill_between(curve.steps, low, high, color=color, alpha=0.13, linewidth=0)
    around = np.pad(known, 1)
    alone = known & ~around[:-2] & ~around[2:]  # an area needs two points
    if alone.any():
        axes.vlines(curve.steps[alone], low[alone], high[alone], color=color, alpha=0.45, linewidth=1.3)


def _is_log(drawn: Sequence[Curve]) -> bool:
    values = np.concatenate([curve.values for curve in drawn if curve.counts] or [curve.values for curve in drawn])
    values = values[np.isfinite(values)]
    is_share = limits_of(drawn[0].metric)[1] == 1.0
    return len(values) > 0 and not is_share and values.min() > 0 and values.max() > _LOG_SCALE * values.min()


def _close_up(drawn: Sequence[Curve]) -> tuple[float, float, float] | None:
    """Return a step and a range of values, from which on and in which most arms lie too close to be told apart.

    They do if the second halves of more than half of the curves, at least four, lie in a small part of the panel.
    """
    curves = [curve for curve in drawn if curve.counts and len(curve.steps) > 3 and np.isfinite(curve.values).all()]
    n_close = len(curves) // 2 + 1
    if len(curves) < 4:
        return None
    scale = np.log if _is_log(drawn) else np.asarray
    every = scale(np.concatenate([curve.values for curve in curves]))
    first = float(np.median([curve.steps[len(curve.steps) // 2] for curve in curves]))
    late = sorted((values.min(), values.max()) for c in curves if len(values := c.values[c.steps >= first]))
    ranges = [
        (low, max(high for _, high in late[place : place + n_close]))
        for place, (low, _) in enumerate(late[: len(late) - n_close + 1])
    ]
    if not ranges:
        return None
    low, high = min(ranges, key=lambda ends: float(scale(np.array(ends[1])) - scale(np.array(ends[0]))))
    part = float(scale(np.array(high)) - scale(np.array(low))) / max(float(every.max() - every.min()), 1e-12)
    if not 0 < part < _CLOSE:
        return None
    margin = 0.25 * (high - low)
    return first, float(low - margin), float(high + margin)


def _draw_curve(axes: "Axes", curve: Curve, look: Look | None) -> None:
    if look and curve.counts:
        marker = look["marker"] if len(curve.steps) <= _MAX_MARKED_POINTS else None
        values = curve.values
        if curve.metric.startswith("train/") and (mean := smoothed(values.tolist())) is not None:
            axes.plot(curve.steps, values, color=look["color"], linewidth=0.6, alpha=0.3)
            values, marker = np.array(mean), None
        axes.plot(curve.steps, values, **look | {"marker": marker}, markersize=4, linewidth=1.3)
    elif look:
        axes.plot(curve.steps, curve.values, color=look["color"], linestyle=":", linewidth=1.3)
    elif curve.counts:  # one of many
        axes.plot(curve.steps, curve.values, color=_OTHERS, linewidth=0.6, zorder=1)


def draw_summary(
    arms: Sequence[Arm], measures: Sequence[Measure], ranking: Sequence[int], baselines: Sequence[Arm] = ()
) -> "Figure":
    """Draw the results of runs and the means of arms over a setting that is a number, or else a row for each arm.

    In rows, the arms with which others are compared are in colour and the others in grey; a line is at the mean of the
    baseline, if there is one alone.
    """
    setting = _numeric_setting(arms)
    return _draw_rows(arms, measures, ranking, baselines) if setting is None else _draw_over(setting, arms, measures)


def _draw_over(setting: str, arms: Sequence[Arm], measures: Sequence[Measure]) -> "Figure":
    looks = dict(zip(dict.fromkeys(_without(arm, setting) for arm in arms), _all_looks(), strict=False))
    ticks = sorted({arm.values[setting] for arm in arms})
    picture, panels = _panels(len(measures))
    for axes, measure in zip(panels, measures, strict=True):
        for others, look in looks.items():
            line = [(arm.values[setting], measure.values(arm.runs)) for arm in arms if _without(arm, setting) == others]
            line = [(place, values) for place, values in line if values]
            for place, values in line:
                axes.plot([place] * len(values), values, ".", color=look["color"], alpha=0.5, markersize=6)
            found = [estimate(values) for _, values in line]
            means, bars = [each.mean for each in found], _bars(measure.metric, found)
            axes.errorbar([place for place, _ in line], means, bars, **look, markersize=5, capsize=3)
        if ticks[0] > 0 and ticks[-1] > 10 * ticks[0]:
            log_scale(axes, "x")
        if len(ticks) <= 8:
            axes.set_xticks(ticks, [f"{tick:,}" if isinstance(tick, int) else f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        axes.set_xlabel(setting)
        axes.set_ylabel(measure.label)
    if len(looks) > 1:
        _legend(picture, looks)
    return picture


def _draw_rows(
    arms: Sequence[Arm], measures: Sequence[Measure], ranking: Sequence[int], baselines: Sequence[Arm]
) -> "Figure":
    numbers = range(len(arms)) if len(arms) <= _MAX_ROWS else ranking[:_MAX_ROWS]
    marked = [number for number in range(len(arms)) if any(arms[number] is arm for arm in baselines)]
    title, names = short_labels(arms)
    picture, panels = _panels(len(measures), height=1.2 + 0.34 * len(numbers))
    for axes, measure in zip(panels, measures, strict=True):
        for row, number in enumerate(numbers):
            color = _COLORS[0] if number in marked or not marked else _ROWS
            if values := measure.values(arms[number].runs):
                found = estimate(values)
                if len(values) > 1:
                    axes.plot(values, [row + 0.25] * len(values), ".", color=color, alpha=0.6, markersize=5)
                bars = _bars(measure.metric, [found])
                axes.errorbar(found.mean, row, xerr=bars, color=color, marker="o", markersize=5, capsize=3)
                if marked == [number]:
                    axes.axvline(found.mean, color=color, linewidth=1, linestyle=":", zorder=1)
            else:
                ended = how_they_ended(arms[number].left_out)
                axes.annotate(ended, (0.02, row), xycoords=("axes fraction", "data"), va="center", color="#777777")
        axes.set_yticks(range(len(numbers)), [_short(names[number]) for number in numbers])
        axes.set_ylabel(title)
        axes.set_ylim(len(numbers) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(measure.label)
    if len(numbers) < len(arms):
        picture.suptitle(f"the best {len(numbers)} of {len(arms)} arms", fontsize=10)
    return picture


def _bars(metric: str, found: Sequence[Estimate]) -> list[list[float]]:
    """Return how far the intervals reach below and above their means, within what the metric can be."""
    least, most = limits_of(metric)
    widths = [each.half_width if each.half_width is not None else 0.0 for each in found]
    below = [max(0.0, min(width, each.mean - least)) for width, each in zip(widths, found, strict=True)]
    above = [max(0.0, min(width, most - each.mean)) for width, each in zip(widths, found, strict=True)]
    return [below, above]


def _numeric_setting(arms: Sequence[Arm]) -> str | None:
    """Return the setting with the most values, at least three, if the other settings leave few lines."""
    n_values = {
        name: len({arm.values[name] for arm in arms})
        for name in arms[0].values
        if all(type(arm.values[name]) in (int, float) for arm in arms)
    }
    name = max(n_values, key=n_values.__getitem__, default=None)
    if name is None or n_values[name] < 3:
        return None
    n_lines = len({_without(arm, name) for arm in arms})
    return name if n_lines <= len(_COLORS) and 2 * n_lines <= len(arms) else None


def _without(arm: Arm, setting: str) -> str:
    return ", ".join(f"{name}={value}" for name, value in arm.shown.items() if name != setting).replace('"', "")


def _all_looks() -> list[Look]:
    """Return all distinguishable lines: solid ones with full markers, then dashed ones with empty markers."""
    return [
        {"color": color, "marker": marker, "linestyle": style, "markerfacecolor": inside or color}
        for style, inside in (("-", None), ("--", "white"))
        for color, marker in zip(_COLORS, _MARKERS, strict=True)
    ]


def _looks(arms: Sequence[Arm], ranking: Sequence[int]) -> dict[int, Look]:
    """Return the lines of the arms, or of the best ones if there are too many.

    If two settings tell the arms apart, one of which has two values, those of the other are the colours, and lines are
    solid with the one value and dashed with the other.
    """
    looks = _all_looks()
    columns = {name: [arm.shown[name] for arm in arms] for name in telling_settings(arms)}
    if len(columns) == 2:
        few, many = sorted(columns.values(), key=lambda column: len(set(column)))
        styles, colors = list(dict.fromkeys(few)), list(dict.fromkeys(many))
        if len(styles) == 2 and len(colors) <= len(_COLORS):
            return {
                number: looks[len(_COLORS) * styles.index(style) + colors.index(color)]
                for number, (style, color) in enumerate(zip(few, many, strict=True))
            }
    shown = range(len(arms)) if len(arms) <= len(looks) else sorted(ranking[: len(_COLORS)])
    return dict(zip(shown, looks, strict=False))


def _panels(n: int, height: float = 4) -> "tuple[Figure, list[Axes]]":
    n_columns = min(2, n)
    n_rows = math.ceil(n / n_columns)
    picture = new_figure(3 + 4 * n_columns, height * n_rows)
    panels = [picture.add_subplot(n_rows, n_columns, place) for place in range(1, n + 1)]
    for axes in panels:
        tidy(axes)
    return picture, panels


def _legend(picture: "Figure", looks: dict[str, Look], title: str = "") -> None:
    """Draw a legend below the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look, markersize=4, label=_short(label)) for label, look in looks.items()]
    inches = 0.8 + 0.085 * max(len(_short(label)) for label in looks)
    n_columns = max(1, min(len(looks), int(picture.get_figwidth() / inches)))
    n_rows = math.ceil(len(looks) / n_columns) + bool(title)
    picture.set_figheight(picture.get_figheight() + 0.25 * n_rows)
    picture.legend(handles=handles, loc="outside lower center", ncols=n_columns, frameon=False, title=title or None)


def _short(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL // 2]} … {label[-_MAX_LABEL // 3 :]}"
