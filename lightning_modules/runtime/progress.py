"""Progress bar of a run: steps, loss, speed, time left."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from lightning_modules.common.ranges import NonNegativeFloat
from lightning_modules.runtime.stages import validates_a_fit

_SHOWN = {"train/loss": "loss", "val/loss": "val loss", "test/loss": "test loss", "perf/tokens_per_second": "tokens/s"}
_KNOWN_LENGTH = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_UNKNOWN_LENGTH = "{desc} {n_fmt} steps [{elapsed}{postfix}]"


class RunProgress(ProgressBar):
    """A progress bar over the optimiser steps of the whole run, with the loss, tokens per second and the time left.

    If the output is a log file and not a terminal, it prints a line from time to time.

    Args:
        refresh_seconds: Seconds between two redraws in a terminal; ten times as many between two lines in a file.
    """

    def __init__(self, refresh_seconds: NonNegativeFloat = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._bar: tqdm | None = None
        self._drawn = 0.0
        self._shown: dict[str, str] = {}  # metrics, as they were last read
        self._written: tuple[float, dict[str, str]] | None = None  # the last line in a file
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but 0."""
        self._enabled = False

    def _open(self, description: str, total: float | None, initial: int = 0) -> None:
        terminal = sys.stderr.isatty()
        # A stream has no length: Lightning says None, infinity, or -1 where the number of steps is not limited.
        length = None if total is None or total in (-1, float("inf")) else int(total)
        self._seconds = self.refresh_seconds if terminal else 10 * self.refresh_seconds
        self._drawn, self._written = time.monotonic(), None
        self._bar = tqdm(
            desc=description,
            total=length,
            initial=initial,
            disable=not self._enabled,
            dynamic_ncols=terminal,
            ncols=None if terminal else 110,
            bar_format=_UNKNOWN_LENGTH if length is None else _KNOWN_LENGTH,
            mininterval=float("inf"),  # `_show` draws: reading the clock at every step costs time
            delay=0 if terminal else float("inf"),  # in a file, no empty first line
        )

    def _show(self, trainer: L.Trainer, position: float, now: bool = False) -> None:
        if self._bar is None or self._bar.disable or not (now or time.monotonic() - self._drawn > self._seconds):
            return
        if now:
            self._read(trainer)
        in_file = not sys.stderr.isatty()
        if in_file and self._written == (position, self._shown):  # by the validation of the last step
            return
        self._drawn, self._bar.n, self._written = time.monotonic(), position, (position, self._shown)
        self._bar.set_postfix(self._shown, refresh=True)
        if in_file:
            self._bar.fp.write("\n")

    def _read(self, trainer: L.Trainer) -> None:
        """Read the metrics; on a GPU this waits for the last step."""
        metrics = trainer.callback_metrics
        values = {short: float(metrics[name]) for name, short in _SHOWN.items() if name in metrics}
        self._shown = {name: f"{value:,.0f}" if value >= 1000 else f"{value:.3f}" for name, value in values.items()}

    def _close(self, trainer: L.Trainer, position: float) -> None:
        if self._bar is not None:
            self._show(trainer, position, now=True)
            self._bar.close()
            self._bar = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the current step."""
        self._open("train", trainer.estimated_stepping_batches, initial=trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Advance the bar; the metrics change at the steps that are logged."""
        every = trainer.log_every_n_steps
        if self._enabled and every > 0 and trainer.global_step % every == 0:
            self._read(trainer)
        self._show(trainer, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, *_: object) -> None:
        """Draw the bar for the last time, also at the step of a failure."""
        self._close(trainer, trainer.global_step)

    on_exception = on_train_end

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open a bar over the batches, unless the validation is part of a fit."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._open(trainer.state.fn.value, _evaluation_batches(trainer))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: object
    ) -> None:
        """Advance the bar."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._show(trainer, batch_idx + 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the new validation loss, or draw the bar for the last time."""
        if validates_a_fit(trainer):
            self._show(trainer, trainer.global_step, now=True)
        elif trainer.state.fn != TrainerFn.FITTING:
            self._close(trainer, _evaluation_batches(trainer))

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end


def _evaluation_batches(trainer: L.Trainer) -> float:
    return sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
