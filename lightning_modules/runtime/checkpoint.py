"""The two checkpoints of a run: the best and the last."""

import math
import operator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.common import run_files
from lightning_modules.common.files import link_or_copy
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.runtime import private_names
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.stages import validates_a_fit

_METRICS = "metrics"  # in a checkpoint


class RunCheckpoint(Checkpoint):
    """Callback that writes `best.ckpt` (by a validation metric) and `last.ckpt` to `checkpoints/` in the run folder.

    The last step of a run is validated too, whatever the interval of the validations: its weights may be the best. Both
    are written after a validation, the best one if the metric improved; then they are one file with two names. A metric
    that is NaN is never the best.
    The last one is also written when the training ends or is stopped. Lightning's `ModelCheckpoint` writes its last
    checkpoint only if the best one improves.

    Args:
        monitor: Metric that decides which checkpoint is the best; `null` writes `last.ckpt` only.
        mode: `min` if small values of the metric are good, `max` if large ones are.
        every_n_train_steps: Optimiser steps between two writes of `last.ckpt`; `null` for none between validations.
    """

    def __init__(
        self,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        every_n_train_steps: PositiveInt | None = None,
    ) -> None:
        self.monitor = monitor
        self.mode = mode
        self.every_n_train_steps = every_n_train_steps
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.best_metrics: dict[str, float] = {}  # all metrics of the best validation
        self.is_last_step = False  # whether the training ends after the step that is done
        self._metrics: dict[str, float] = {}  # of the checkpoint that the run resumes from
        self._run = Path()
        self._step_of_last = -1
        self._complete = self.state_dict()  # at the last checkpoint whose file is complete

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Set the folder on all ranks to that of rank 0."""
        self._run = Path(trainer.strategy.broadcast(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `last.ckpt` every so many steps, when all callbacks and loggers have seen the step."""
        self.is_last_step = False
        if self.every_n_train_steps:
            private_names.call_after_steps(trainer, self._save_if_due)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the best score if its weights are not in the folder: it is that of the run that it began from.

        The metrics of the checkpoint are there again: a callback may read them when the epoch ends, before any other.
        """
        restored = {name: torch.tensor(value) for name, value in self._metrics.items()}
        private_names.computed_metrics(trainer).update(restored)
        if not trainer.strategy.broadcast((self._run / run_files.checkpoint("best")).is_file()):
            self.best_score, self.best_step, self.best_metrics = None, None, {}
            self._complete = self.state_dict()

    def _save_if_due(self, trainer: L.Trainer) -> None:
        due = self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0
        if due and not private_names.training_is_done(trainer):  # `on_train_end` writes it, when all have ended
            self.save_last(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Let Lightning validate after the last step, in an epoch without validations too."""
        self.is_last_step = _is_last_step(trainer)
        if self.is_last_step and trainer.enable_validation:
            private_names.make_validation_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `best.ckpt` if the metric improved, and `last.ckpt` in any case."""
        if not validates_a_fit(trainer):
            return
        self.is_last_step = _is_last_step(trainer)  # the validation may stop the training
        if self.monitor is not None:
            score, best = self._score(trainer), self.best_score
            better = operator.lt if self.mode == "min" else operator.gt
            # A score that is NaN is never the best; it may be in checkpoints of earlier versions.
            if not math.isnan(score) and (best is None or math.isnan(best) or better(score, best)):
                self._save(trainer, "best", "last")
                return
        self._save(trainer, "last")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `last.ckpt` with the weights after the last step."""
        self.save_last(trainer)
        self.wait()

    def wait(self) -> None:
        """Wait until the files are complete; the best score is then that of the file that is there.

        Raises:
            OSError: If the disk is full or the folder cannot be written.
        """
        try:
            AtomicCheckpointIO.wait()
        finally:
            self.load_state_dict(self._complete)

    @property
    def has_last(self) -> bool:
        """Whether `last.ckpt` is there."""
        return (self._run / run_files.checkpoint("last")).is_file()

    def save_last(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt`, unless it was written at this step or gradients are being accumulated."""
        if self._step_of_last != trainer.global_step and not private_names.is_accumulating(trainer):
            self._save(trainer, "last")

    def _save(self, trainer: L.Trainer, *names: str) -> None:
        """Write a checkpoint under the first name; the others become names of the same file."""
        if "best" in names:  # set first, because the checkpoint holds it
            self._set_best(trainer)
        state = self.state_dict()
        if trainer.fast_dev_run:
            self._complete = state
            return
        first, *others = (self._run / run_files.checkpoint(name) for name in names)
        trainer.save_checkpoint(first)

        def complete() -> None:
            self._complete = state
            for other in others if trainer.is_global_zero else ():
                link_or_copy(first, other)

        AtomicCheckpointIO.then(complete)
        if "last" in names:
            self._step_of_last = trainer.global_step

    def _set_best(self, trainer: L.Trainer) -> None:
        self.best_score, self.best_step = self._score(trainer), trainer.global_step
        metrics = trainer.callback_metrics.items()
        self.best_metrics = {name: float(value) for name, value in metrics if not name.startswith(("train/", "perf/"))}

    def _score(self, trainer: L.Trainer) -> float:
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"RunCheckpoint: monitor={self.monitor!r} was not logged by the validation; "
                f"it logged {', '.join(sorted(trainer.callback_metrics)) or 'nothing'}"
            )
        return float(trainer.callback_metrics[self.monitor])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the metrics."""
        metrics = private_names.computed_metrics(trainer)
        checkpoint[_METRICS] = {name: float(value) for name, value in metrics.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the metrics."""
        self._metrics = checkpoint.get(_METRICS, {}) if trainer.state.fn == TrainerFn.FITTING else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far."""
        best = {"best_score": self.best_score, "best_step": self.best_step, "best_metrics": self.best_metrics}
        return {"monitor": self.monitor, **best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far; of a run that monitored another metric, what `best.ckpt` has of this one."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        self.best_metrics = state_dict.get("best_metrics", {})
        if state_dict.get("monitor", self.monitor) != self.monitor:
            self.best_score = self.best_metrics.get(self.monitor or "")
        self._complete = self.state_dict()


def _is_last_step(trainer: L.Trainer) -> bool:
    """Return whether the training ends after the batch that is done."""
    step, epochs = trainer.global_step, trainer.current_epoch + trainer.is_last_batch
    if 0 < trainer.max_steps <= step or 0 < (trainer.max_epochs or 0) <= epochs:
        return True
    # A trainer that is asked to stop too early goes on, and still has `should_stop`.
    return trainer.should_stop and (trainer.min_steps or 0) <= step and (trainer.min_epochs or 0) <= epochs


def run_checkpoints(trainer: L.Trainer) -> list[RunCheckpoint]:
    """Return the callbacks of this class that a trainer has."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]


def save_last(trainer: L.Trainer) -> None:
    """Write `last.ckpt` now, unless it was written at this step, and wait for it; call it on all ranks."""
    for callback in run_checkpoints(trainer):
        callback.save_last(trainer)
        callback.wait()
        trainer.strategy.barrier()  # a rank that exits earlier would take along the one that writes
