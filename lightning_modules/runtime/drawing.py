"""Figures and tables of a run: drawn without pyplot, written to the run folder, shown to every logger."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.figures import new_figure, save_figure
from lightning_modules.runtime.loggers import MetricsCSV


class DrawsAtTheEnd(L.Callback):
    """Base of callbacks that draw figures from files of the run when the training ends, also by a failure."""

    def draw(self, run: Path) -> list[Path]:
        """Draw the figures of a run folder and return their files."""
        raise NotImplementedError

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the figures and show them to the loggers."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        show_figures(trainer, self.draw(Path(trainer.default_root_dir)))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Draw the figures of a run that failed, if it made a step."""
        if trainer.global_step:
            self.on_train_end(trainer, pl_module)


def draw_by_group(
    series: Mapping[str, Mapping[str, float]], file: Path, xlabel: str, ylabel: str, baseline: float | None = None
) -> Path:
    """Draw one metric by group, such as accuracy by distance, and return the file.

    Args:
        series: For each line of the legend, the value of the metric by group; the groups are drawn in this order.
        file: PNG file to create or replace.
        xlabel: Label of the groups.
        ylabel: Label of the metric.
        baseline: Value of a guess, drawn as a dotted line.
    """
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(group for values in series.values() for group in values))
    width = 0.8 / max(1, len(series))
    for number, (label, values) in enumerate(series.items()):
        places = [groups.index(group) + (number - (len(series) - 1) / 2) * width for group in values]
        axes.bar(places, list(values.values()), width, label=label)
    if baseline is not None:
        axes.axhline(baseline, color="black", linestyle=":", linewidth=1, label="guess")
    axes.set_xticks(range(len(groups)), groups)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return save_figure(figure, file)


def show_figures(trainer: L.Trainer, files: Iterable[Path]) -> None:
    """Log figures to every logger that takes images, as `figures/<name of the file>`."""
    for file in files:
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(f"figures/{file.stem}", [str(file)])


def show_table(trainer: L.Trainer, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Log a table to every logger that takes tables."""
    cells = [list(row) for row in rows]
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(name, columns=list(columns), data=cells)


def log_before_training(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Log metrics at step 0, before any optimiser step was made; nothing if there are none."""
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(dict(metrics), step=None)
