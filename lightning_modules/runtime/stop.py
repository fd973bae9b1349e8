"""Callbacks that stop a run: with a checkpoint on SIGTERM and Ctrl-C, and if the loss is infinite or NaN."""

import contextlib
import math
import os
import signal
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.messages import ERASE_LINE, on_terminal
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.runtime import private_names
from lightning_modules.runtime.checkpoint import save_last

_MOST_UNREAD = 1000  # losses of steps on a GPU, if metrics are logged seldom or never


class GracefulStop(L.Callback):
    """Callback that stops all ranks after the same optimiser step, with a checkpoint, on SIGTERM or Ctrl-C.

    A signal to one rank is enough. The exit code is 128 + the number of the signal: 143 for SIGTERM, 130 for Ctrl-C. A
    second signal ends the process at once, or after a checkpoint that is being written in the background. Nothing is
    saved between two micro-batches of one optimiser step, because accumulated gradients are not part of a checkpoint.

    Args:
        every_n_steps: Number of optimiser steps between two exchanges of signals between the ranks. A run on one
            process ignores it, and stops after the step in progress.
    """

    def __init__(self, every_n_steps: PositiveInt = 10) -> None:
        self.every_n_steps = every_n_steps
        self.received = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._previous_handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switch off Lightning's own handling of SIGTERM."""
        private_names.skip_sigterm_broadcast(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers, and open a process group on the CPU, which serves GPU processes too."""
        self.received = 0
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[signal_number] = signal.signal(signal_number, self._on_signal)
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def _on_signal(self, signal_number: int, frame: object) -> None:
        self.received = signal_number
        for number in self._previous_handlers:
            signal.signal(number, _stop_at_once)
        if rank_zero_only.rank == 0:
            what = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
            line = f"{what}: stopping after this step, with a checkpoint; a second one stops at once\n"
            # Not `print`, which cannot be called while the signal interrupts it.
            with contextlib.suppress(OSError):  # the terminal or the pipe is gone, and the checkpoint is still due
                os.write(2, f"{ERASE_LINE if on_terminal() else ''}{line}".encode())

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Save and raise `SystemExit` between two optimiser steps if any rank got a signal."""
        due = self.received if self._group is None else trainer.global_step % self.every_n_steps == 0
        # A validation may follow the last batch of an epoch; stop after it, since RunCheckpoint saves after it too.
        if not due or private_names.is_accumulating(trainer) or trainer.is_last_batch:
            return
        received = torch.tensor([self.received])
        if self._group is not None:
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX, group=self._group)
        if received.item():
            save_last(trainer)
            raise SystemExit(128 + int(received.item()))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the earlier signal handlers."""
        for signal_number, handler in self._previous_handlers.items():
            signal.signal(signal_number, handler)
        self._previous_handlers = {}


def _stop_at_once(signal_number: int, frame: object) -> None:
    raise SystemExit(128 + signal_number)


class StopOnNonFiniteLoss(L.Callback):
    """Callback that stops the run if the training loss is infinite or NaN, before a checkpoint is written.

    On a GPU the losses stay there, and are read when metrics are logged and before a checkpoint, so that the GPU does
    not have to wait.

    Args:
        every_n_steps: Fewest optimiser steps between two readings on a GPU.
    """

    def __init__(self, every_n_steps: PositiveInt = 10) -> None:
        self.every_n_steps = every_n_steps
        self._steps: list[int] = []  # whose losses have not been read
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        """Keep the loss, and stop if a reading is due and a loss is not finite."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        on_cpu, every = loss.device.type == "cpu", trainer.log_every_n_steps
        self._steps.append(trainer.global_step)
        # A copy, because CUDA graphs use the memory of the loss again.
        self._losses.append(loss.detach() if on_cpu else loss.detach().clone())
        logged = every and trainer.global_step % every == 0
        if on_cpu or (logged and len(self._steps) >= self.every_n_steps) or len(self._steps) >= _MOST_UNREAD:
            self._check()

    def on_save_checkpoint(self, *_: object) -> None:
        """Check before a checkpoint replaces a good one."""
        self._check()

    def on_train_end(self, *_: object) -> None:
        """Check the last steps."""
        self._check()

    def _check(self) -> None:
        """Raise `MisconfigurationException` if the loss of a step was not finite."""
        if not self._steps:
            return
        losses = [self._losses[0].item()] if len(self._losses) == 1 else torch.stack(self._losses).tolist()
        bad = [step for step, loss in zip(self._steps, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            raise MisconfigurationException(
                f"the training loss was not finite at step {bad[0]}: lower optimizer.lr, clip the gradients "
                "(trainer.gradient_clip_val) or warm the rate up; the last good checkpoint was kept"
            )
        self._steps, self._losses = [], []
