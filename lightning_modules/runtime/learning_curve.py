"""Learning curve of a run, drawn from its `metrics.csv`."""

import csv
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.common import run_files
from lightning_modules.common.figures import annotate, integer_steps, new_figure, save_figure, smoothed
from lightning_modules.runtime.drawing import DrawsAtTheEnd


class LearningCurve(DrawsAtTheEnd):
    """Callback that draws `figures/learning_curve.png` from `metrics.csv` when the training ends, also by a failure.

    Args:
        train_metric: Metric of the training steps.
        val_metric: Metric of the validations; the smallest value of a loss is marked.
    """

    def __init__(self, train_metric: str = "train/loss", val_metric: str = "val/loss") -> None:
        self.train_metric = train_metric
        self.val_metric = val_metric

    def draw(self, run: Path) -> list[Path]:
        """Draw both metrics against the step."""
        metrics_csv = run / run_files.METRICS
        train, val = read_metric(metrics_csv, self.train_metric), read_metric(metrics_csv, self.val_metric)
        if not train[0] and not val[0]:
            return []
        figure = new_figure(7, 4)
        axes = figure.add_subplot()
        mean = smoothed(train[1])
        if mean is None:
            axes.plot(*train, color="tab:blue", linewidth=1, alpha=0.7, label=self.train_metric)
        else:
            axes.plot(*train, color="tab:blue", linewidth=0.8, alpha=0.3)
            axes.plot(train[0], mean, color="tab:blue", linewidth=1.5, label=f"{self.train_metric}, smoothed")
        if val[0]:
            axes.plot(*val, color="tab:orange", marker="o", markersize=4, label=self.val_metric)
        if val[0] and self.val_metric.endswith("loss"):
            best = min(zip(val[1], val[0], strict=True))
            # On the side of the point on which the curve of the training is not.
            is_below = np.interp(best[1], train[0], mean or train[1]) <= best[0] if train[0] else True
            annotate(axes, f"{best[0]:.3f}", best[::-1], offset=(0, 8 if is_below else -17), ha="center")
        axes.set(xlabel="optimiser step", ylabel=self.val_metric.rsplit("/", 1)[-1])
        integer_steps(axes)
        axes.grid(alpha=0.3)
        axes.legend()
        return [save_figure(figure, run / "figures/learning_curve.png")]


def read_metrics(metrics_csv: Path, *names: str) -> tuple[list[int], list[list[float]]]:
    """Return the steps at which all of some metrics were logged, and the values of each metric at these steps.

    A callback that a resumed run adds has no values of earlier validations.

    Raises:
        MisconfigurationException: As `read_metric`.
    """
    columns = [dict(zip(*read_metric(metrics_csv, name), strict=True)) for name in names]
    steps = [step for step in columns[0] if all(step in column for column in columns)]
    return steps, [[column[step] for step in steps] for column in columns]


def read_metric(metrics_csv: Path, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was logged, and its values; two empty lists if it was not.

    Raises:
        MisconfigurationException: If a row cannot be read; the message has its line number.
    """
    steps: list[int] = []
    values: list[float] = []
    if not metrics_csv.is_file():  # a run that ended before it logged anything
        return steps, values
    with metrics_csv.open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            if row.get(name):
                try:
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
                except ValueError as error:
                    raise MisconfigurationException(f"{metrics_csv}, line {line}: {error}") from error
    return steps, values
