"""Figures of a run, drawn from what the run saved, so that they can be drawn again."""

import csv
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.loggers import MetricsCSV


class LearningCurve(L.Callback):
    """Draws `figures/learning_curve.png` from `metrics.csv` when the training ends, however it ends.

    Args:
        train_metric: Metric of the training steps.
        val_metric: Metric of the validations.
    """

    def __init__(self, train_metric: str = "train/loss", val_metric: str = "val/loss") -> None:
        self.train_metric = train_metric
        self.val_metric = val_metric

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws, and shows the figure to the loggers that take pictures."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        folder = Path(trainer.default_root_dir)
        figure = folder / "figures" / "learning_curve.png"
        if not draw_learning_curve(folder / "metrics.csv", figure, self.train_metric, self.val_metric):
            return
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("figures/learning_curve", [str(figure)])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Draws what there is."""
        if trainer.global_step:
            self.on_train_end(trainer, pl_module)


def read_metric(metrics_csv: Path, name: str) -> tuple[list[int], list[float]]:
    """Reads one metric of a run.

    Args:
        metrics_csv: A run's `metrics.csv`.
        name: Column.

    Returns:
        The steps at which the metric was logged, and its values.

    Raises:
        MisconfigurationException: If a row cannot be read (with its line number).
    """
    steps, values = [], []
    with metrics_csv.open(newline="") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            if row.get(name):
                try:
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
                except ValueError as error:
                    raise MisconfigurationException(f"{metrics_csv}, line {line}: {error}") from error
    return steps, values


def draw_learning_curve(metrics_csv: Path, figure: Path, train_metric: str, val_metric: str) -> bool:
    """Draws a training and a validation metric against the step.

    Args:
        metrics_csv: A run's `metrics.csv`.
        figure: PNG file to write.
        train_metric: Column of the thin line.
        val_metric: Column of the line with dots.

    Returns:
        Whether there was anything to draw.
    """
    if not metrics_csv.is_file():
        return False
    train, val = read_metric(metrics_csv, train_metric), read_metric(metrics_csv, val_metric)
    if not train[0] and not val[0]:
        return False
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    picture = Figure(figsize=(7, 4), layout="constrained")
    axes = picture.add_subplot()
    axes.plot(*train, color="tab:blue", linewidth=1, alpha=0.7, label=train_metric)
    if val[0]:
        axes.plot(*val, color="tab:orange", marker="o", markersize=4, label=val_metric)
        best = min(range(len(val[1])), key=val[1].__getitem__)
        axes.annotate(
            f"{val[1][best]:.3f}", (val[0][best], val[1][best]), textcoords="offset points", xytext=(0, 8), ha="center"
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(val_metric.rsplit("/", 1)[-1])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.parent.mkdir(parents=True, exist_ok=True)
    temporary = figure.with_suffix(".tmp.png")
    picture.savefig(temporary, dpi=120)
    temporary.replace(figure)
    return True
