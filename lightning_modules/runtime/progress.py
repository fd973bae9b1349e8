"""Progress of a run: steps, loss, speed, time left; one line of a terminal, or some lines of a file."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lightning_modules.base import GradientFreeModule
from lightning_modules.common.messages import ERASE_LINE, on_terminal
from lightning_modules.common.ranges import NonNegativeFloat
from lightning_modules.runtime import private_names
from lightning_modules.runtime.stages import step_is_logged, validates_a_fit

_SHOWN = {
    "train/loss": "loss",
    "val/loss": "val loss",
    "val/accuracy": "val accuracy",
    "test/loss": "test loss",
    "test/accuracy": "test accuracy",
    "perf/tokens_per_second": "tokens/s",
}
_BAR = 20  # columns, fewer in a narrow terminal
_USUAL_WIDTH = 80  # columns of a terminal that does not say its width
_SHARE_BETWEEN_LINES = 0.02  # of the time so far: the lines of a file get rarer in a long run


class ProgressLine:
    """A line about the progress of one activity: written over in a terminal, written anew in a file.

    Args:
        name: Name of the activity, such as `train`.
        total: Number of steps at the end, or `None` if it is not known.
        initial: Number of steps at the start.
        seconds: Fewest seconds between two drawings in a terminal; ten times as many in a file.
    """

    def __init__(self, name: str, total: int | None, initial: float = 0, seconds: float = 0.5) -> None:
        self.units = ("step", "steps")  # words for one, and for several
        self.name, self.total, self.initial, self.position = name, total, initial, initial
        self.in_terminal = on_terminal()
        self.seconds = seconds if self.in_terminal else 10 * seconds
        self.shown: Mapping[str, str] = {}  # metrics
        self._began = self._drawn = time.monotonic()
        self._last = ""  # what was drawn, without the times

    @property
    def is_due(self) -> bool:
        """Whether it is time to draw."""
        now = time.monotonic()
        rarer = 0.0 if self.in_terminal else _SHARE_BETWEEN_LINES * (now - self._began)
        return now - self._drawn > max(self.seconds, rarer)

    def draw(self) -> None:
        """Draw the line, in a file only if something has changed."""
        self._drawn = time.monotonic()
        if self.in_terminal:
            _write(ERASE_LINE + self.text(terminal_width() - 1))
        elif self._last != (content := f"{self.position} {self.shown}"):
            self._last = content
            _write(f"{self.text()}\n")

    def close(self, keep: bool = True) -> None:
        """End the line of a terminal, or remove it."""
        if self.in_terminal:
            _write("\n" if keep else ERASE_LINE)

    def text(self, width: int | None = None) -> str:
        """Return the line; in a terminal it has a bar, and leaves out metrics that do not fit into `width` columns."""
        elapsed = time.monotonic() - self._began
        done = self.position - self.initial
        start = f"{self.name:<8}"
        if self.total:
            start += f"{min(1.0, self.position / self.total):5.0%} "
            count = f"{self.position:.0f}/{self.total}"
            left = "?" if done <= 0 else _clock(elapsed / done * max(0, self.total - self.position))
            times = f"{_clock(elapsed)}<{left}"
        else:
            count, times = f" {self.position:.0f} {self.units[self.position != 1]}", _clock(elapsed)
        metrics = [f"{name}={value}" for name, value in self.shown.items()]
        end = f"{count} [{', '.join([times, *metrics])}]"
        if width is None:
            return start + end
        while metrics and len(start + end) > width:
            metrics.pop()
            end = f"{count} [{', '.join([times, *metrics])}]"
        n_columns = min(_BAR, width - len(start + end) - 3)
        if self.total and n_columns >= 4:
            n_full = round(n_columns * min(1.0, self.position / self.total))
            end = f"|{_full_block() * n_full}{' ' * (n_columns - n_full)}| {end}"
        return (start + end)[:width]


def _write(text: str) -> None:
    """Write to standard error; a run goes on if its terminal or pipe is gone, or its stream is closed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def terminal_width() -> int:
    """Return the columns of the terminal of standard error: `COLUMNS`, what the terminal says, or 80."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_WIDTH
    except (OSError, ValueError):
        return _USUAL_WIDTH


def _full_block() -> str:
    try:
        "█".encode(sys.stderr.encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "█"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


class RunProgress(ProgressBar):
    """The progress over the optimiser steps of the whole run, with the loss, tokens per second and the time left.

    A validation shows its batches in its place. If the output is a file and not a terminal, there is a line after each
    validation, and from time to time, rarer the longer the run lasts.

    Args:
        refresh_seconds: Seconds between two drawings in a terminal; ten times as many, or more, between two lines in a
            file.
    """

    def __init__(self, refresh_seconds: NonNegativeFloat = 0.5) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._line: ProgressLine | None = None
        self._validation: ProgressLine | None = None  # of a fit
        self._shown: dict[str, str] = {}  # metrics, as they were last read
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but 0."""
        self._enabled = False

    def _open(self, name: str, total: float | None, initial: int = 0) -> ProgressLine | None:
        # A stream has no length: Lightning says None, infinity, or -1 where the number of steps is not limited.
        length = None if total is None or total in (-1, float("inf")) else int(total)
        return ProgressLine(name, length, initial, self.refresh_seconds) if self._enabled else None

    def _show(self, trainer: L.Trainer, position: float, now: bool = False) -> None:
        line = self._line
        if line is None:
            return
        line.position = position
        if now:
            self._read(trainer)
        if now or line.is_due:
            line.shown = self._shown
            line.draw()

    def _read(self, trainer: L.Trainer) -> None:
        """Read the metrics; on a GPU this waits for the last step."""
        metrics = trainer.callback_metrics
        values = {short: float(metrics[name]) for name, short in _SHOWN.items() if name in metrics}
        self._shown = {name: f"{value:,.0f}" if value >= 100 else f"{value:.3f}" for name, value in values.items()}

    def _close(self, position: float) -> None:
        """Draw the metrics as they were last read, and end the line."""
        if self._line is not None:
            self._line.position, self._line.shown = position, self._shown
            self._line.draw()
            self._line.close()
            self._line = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start at the current step."""
        self._line = self._open("train", trainer.estimated_stepping_batches, initial=trainer.global_step)
        if self._line and isinstance(pl_module, GradientFreeModule):
            self._line.units = ("batch read", "batches read")

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Advance; the metrics change at the steps that are logged."""
        if self._enabled and step_is_logged(trainer) and not private_names.is_accumulating(trainer):
            self._read(trainer)
        self._show(trainer, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, *_: object) -> None:
        """Draw for the last time."""
        self._read(trainer)
        self._close(trainer.global_step)

    def on_exception(self, trainer: L.Trainer, *_: object) -> None:
        """Draw for the last time, at the step of a failure.

        The metrics are not read: Lightning would compute some of them on all ranks together, and the others may go on.
        """
        self._validation = None
        if self._line is not None:
            is_fit = trainer.state.fn == TrainerFn.FITTING
            self._close(trainer.global_step if is_fit else self._line.position)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start at the first batch of the validation."""
        name = "test" if trainer.testing else "validate"
        line = self._open(name, _evaluation_batches(trainer))
        if trainer.state.fn == TrainerFn.FITTING:
            self._validation = line
        else:
            self._line = line

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: object
    ) -> None:
        """Advance."""
        if line := self._validation or self._line:
            line.position = batch_idx + 1
            if line.is_due:
                line.draw()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the new validation loss at the step of the training, or draw for the last time."""
        if self._validation is not None:
            self._validation.close(keep=False)
            self._validation = None
        if validates_a_fit(trainer):
            self._show(trainer, trainer.global_step, now=True)
        elif trainer.state.fn != TrainerFn.FITTING:
            self._read(trainer)
            self._close(_evaluation_batches(trainer))

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end


def _evaluation_batches(trainer: L.Trainer) -> float:
    return sum(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
