"""Leaving a run in good order: on SIGTERM and Ctrl-C, and when the loss is no longer a number."""

import math
import signal
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.runtime import private_names
from lightning_modules.runtime.checkpoint import save_last


class GracefulStop(L.Callback):
    """On SIGTERM or Ctrl-C to any rank, all ranks save `last.ckpt` after the same optimiser step and leave together.

    The exit code is 128 + the signal's number, as of a process that the signal ended: 143 for SIGTERM, 130 for Ctrl-C.
    A second signal ends the process at once. Nothing is saved between two micro-batches of one optimiser step, since
    accumulated gradients are not part of a checkpoint.

    Args:
        every_n_steps: Optimiser steps between two agreements of the ranks (at least 1). A single process needs none.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise MisconfigurationException(f"GracefulStop: every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.received = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._previous_handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the two signals over from Lightning."""
        private_names.leave_sigterm_to_us()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens, and opens a group in which CPU processes and GPU processes agree alike."""
        self.received = 0
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[signal_number] = signal.signal(signal_number, self._on_signal)
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def _on_signal(self, signal_number: int, frame: object) -> None:
        self.received = signal_number
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signal_number, handler in self._previous_handlers.items():
            signal.signal(signal_number, signal.default_int_handler if signal_number == signal.SIGINT else handler)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Between two optimiser steps: leaves if any rank was told to."""
        if self._group is None:
            if not self.received:
                return
        elif trainer.global_step % self.every_n_steps:
            return
        # After the last batch of an epoch a validation may follow; the signal waits for it, as the checkpoint does.
        if private_names.is_accumulating(trainer) or trainer.is_last_batch:
            return
        received = torch.tensor([self.received])
        if self._group is not None:
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX, group=self._group)
        if received.item():
            save_last(trainer)
            raise SystemExit(128 + int(received.item()))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        for signal_number, handler in self._previous_handlers.items():
            signal.signal(signal_number, handler)
        self._previous_handlers = {}


class StopOnNonFiniteLoss(L.Callback):
    """Ends the run when the training loss is infinite or not a number, before such weights can be saved.

    On a GPU the loss is watched there at every batch, and read every few steps and before every checkpoint, so that the
    GPU is not made to wait for it.

    Args:
        every_n_steps: Optimiser steps between two readings on a GPU (at least 1).
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self._first_bad_step: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        """Remembers the first step whose loss was not finite."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        if loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                raise _not_finite(trainer.global_step)
            return
        if self._first_bad_step is None:
            self._first_bad_step = torch.full_like(loss, torch.inf, dtype=torch.float64)
        step = torch.where(torch.isfinite(loss.detach()), torch.inf, float(trainer.global_step))
        self._first_bad_step = torch.minimum(self._first_bad_step, step)
        if trainer.global_step % self.every_n_steps == 0:
            self._check()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """Lets no checkpoint be written over a good one once the loss has gone."""
        self._check()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the last steps too."""
        self._check()

    def _check(self) -> None:
        if self._first_bad_step is not None and torch.isfinite(self._first_bad_step):
            raise _not_finite(int(self._first_bad_step))


def _not_finite(step: int) -> MisconfigurationException:
    return MisconfigurationException(
        f"the training loss was not finite at step {step}: lower optimizer.lr, clip the gradients "
        "(trainer.gradient_clip_val) or warm the rate up; the last good checkpoint was kept"
    )
