"""Callbacks that stop a run: with a checkpoint on SIGTERM and Ctrl-C, and if the loss is infinite or NaN."""

import contextlib
import math
import os
import signal
import threading
import time
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.tensor import DTensor

from lightning_modules.common.messages import ERASE_LINE, on_terminal
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.common.signals import STOPS, as_asked, exit_at_once
from lightning_modules.runtime import private_names
from lightning_modules.runtime.averaging import AveragedWeights
from lightning_modules.runtime.checkpoint import run_checkpoints, save_last
from lightning_modules.runtime.processes import gathered
from lightning_modules.runtime.stages import step_is_logged, validates_a_fit

_LONGEST_WAIT = 5.0  # seconds from a signal to the exchange of signals; torchrun kills 30 seconds after its SIGTERM
_DUE = "validation_is_due"  # in a checkpoint that was written within a validation
_PREPARING = ("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start")
# Callbacks that leave a run as it is in these hooks, but for `AveragedWeights`.
_OWN = ("experiments.run.", "lightning_modules.runtime.", "lightning.pytorch.callbacks.progress.")
_MOST_UNREAD = 1000  # losses of batches on a GPU, if metrics are logged seldom or never


class GracefulStop(L.Callback):
    """Callback that stops all ranks after the same optimiser step, with a checkpoint, on SIGTERM or Ctrl-C.

    It stops when all callbacks and loggers have seen the step, and before the next batch of a validation, which the
    resumed run does again from its beginning. It waits for a validation between two micro-batches, and where callbacks
    or modules of others prepare one, as by exchanging weights. A run whose last step is done ends as usual.

    A signal to one rank is enough. The exit code is 128 + the number of the signal: 143 for SIGTERM, 130 for Ctrl-C.
    SIGUSR1, which a job of SLURM can ask for (`--signal=USR1@300`), is the same as SIGTERM. A second signal ends the
    process at once, or after a checkpoint that is being written in the background, as does SIGTERM before the first
    step, and in a run that does not train; W&B's upload keeps its limit. Nothing is saved between two micro-batches of
    one optimiser step, because accumulated gradients are not part of a checkpoint.

    Args:
        every_n_steps: Most optimiser steps between two exchanges of signals between the ranks; fewer if so many steps
            take more than 5 seconds. A run on one process ignores it, and stops after the step in progress.
    """

    def __init__(self, every_n_steps: PositiveInt = 10) -> None:
        self.every_n_steps = every_n_steps
        self.received = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._exchanged = 0, -math.inf  # step and time of the last exchange
        self._next_exchange = 0  # its step, unless a multiple of `every_n_steps` comes before it
        self._n_validated: int | None = None  # batches of the validation in progress, if it can be left
        self._validation_is_due = False  # since the run that this one resumes has left it
        self._previous_handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Exit with code 143 on SIGTERM, in place of Lightning's own handling.

        So on SIGUSR1, on which Lightning would write a checkpoint in a job of SLURM that a resumed run does not read.
        """

        def stop(signal_number: int, frame: object) -> None:
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal_number)  # the ranks that this process has started
            exit_at_once(signal_number, frame)

        self._n_validated, self._validation_is_due = None, False
        private_names.leave_sigterm_alone(trainer)
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.getsignal(number) for number in STOPS}
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, stop)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop between two steps, and do the validation that the run to resume has left."""
        private_names.call_after_steps(trainer, self._stop_if_asked)
        private_names.call_before_steps(trainer, self._validate_if_due)

    def _validate_if_due(self, trainer: L.Trainer) -> None:
        if self._validation_is_due:  # some strategies load the checkpoint after `on_fit_start`
            private_names.validate_again(trainer)
            self._validation_is_due = False  # also of a run that validates no longer

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers, and open a process group on the CPU, which serves GPU processes too."""
        self.received = 0
        for number in self._previous_handlers:
            signal.signal(number, partial(self._on_signal, trainer))
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        self._exchange_at_once()

    def _exchange_at_once(self) -> None:
        self._exchanged, self._next_exchange = (0, -math.inf), 0  # the second measures the speed

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find whether the validation can be left."""
        if not validates_a_fit(trainer):
            return
        # To leave the first validation of a resumed run again, the checkpoint that it has resumed from must be its own.
        is_saved = not self._validation_is_due or any(callback.has_last for callback in run_checkpoints(trainer))
        if self._is_as_long_on_all(trainer, is_saved and _can_be_left(trainer, pl_module)):
            self._n_validated = 0
            self._exchange_at_once()

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Leave the validation if any rank got a signal, with the checkpoint of a run that has not begun it."""
        if self._n_validated is None:
            return
        if not (received := self._received(self._n_validated)):
            self._n_validated += 1
            return
        if not self._validation_is_due:
            for callback in trainer.callbacks:
                if isinstance(callback, AveragedWeights):
                    callback.on_validation_end(trainer, pl_module)  # which puts the trained weights back
            self._validation_is_due = True
            save_last(trainer)
        raise SystemExit(128 + received)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exchange signals after the step, whose validation is done."""
        if validates_a_fit(trainer):
            self._n_validated, self._validation_is_due = None, False
            self._exchange_at_once()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save whether the validation of the step has been left."""
        if self._validation_is_due:
            checkpoint[_DUE] = True

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find whether the validation of the step has been left."""
        self._validation_is_due = trainer.state.fn == TrainerFn.FITTING and checkpoint.get(_DUE, False)

    def _is_as_long_on_all(self, trainer: L.Trainer, can_be_left: bool) -> bool:
        """Return whether a validation can be left, and has as many batches on all ranks, which exchange signals."""
        if self._group is None:
            return can_be_left
        n = float(sum(trainer.num_val_batches)) if can_be_left else math.inf
        bounds = torch.tensor([n, -n], dtype=torch.float64)
        torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX, group=self._group)
        most, least = bounds.tolist()
        return most == -least < math.inf

    def _on_signal(self, trainer: L.Trainer, signal_number: int, frame: object) -> None:
        self.received = as_asked(signal_number)
        for number in self._previous_handlers:
            signal.signal(number, exit_at_once)
        if rank_zero_only.rank == 0:
            what = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
            line = f"{what}: {self._reaction(trainer)}; a second one stops at once\n"
            # Not `print`, which cannot be called while the signal interrupts it.
            with contextlib.suppress(OSError):  # the terminal or the pipe is gone, and the checkpoint is still due
                os.write(2, f"{ERASE_LINE if on_terminal() else ''}{line}".encode())

    def _reaction(self, trainer: L.Trainer) -> str:
        """Return what a run does on a signal that comes now, in words."""
        if any(checkpoint.is_last_step for checkpoint in run_checkpoints(trainer)):
            return "the run has done its last step and ends"
        if self._n_validated is not None and self._n_validated < sum(trainer.num_val_batches):
            return "leaving this validation, which the resumed run does again, with a checkpoint"
        waits = trainer.validating and not private_names.is_accumulating(trainer)
        return f"stopping after this {'validation' if waits else 'step'}, with a checkpoint"

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        """Save and raise `SystemExit` if any rank got a signal."""
        received = self._received(trainer.global_step)
        if received and not private_names.training_is_done(trainer):
            save_last(trainer)
            raise SystemExit(128 + received)

    def _received(self, step: int) -> int:
        return self.received if self._group is None else self._exchange(step)

    def _exchange(self, step: int) -> int:
        """Return the signal that any rank got, if the ranks exchange signals after this step; otherwise 0."""
        if step % self.every_n_steps and step < self._next_exchange:
            return 0
        (before, since), now = self._exchanged, time.monotonic()
        of_all = torch.tensor([self.received, (now - since) / max(1, step - before)], dtype=torch.float64)
        torch.distributed.all_reduce(of_all, op=torch.distributed.ReduceOp.MAX, group=self._group)
        received, seconds = of_all.tolist()  # the same on all ranks, which so agree on the next exchange
        self._exchanged, self._next_exchange = (step, now), step + max(1, int(_LONGEST_WAIT / seconds))
        return int(received)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let rank 0 close the record of the run: Lightning would kill it some seconds after the ranks it started."""
        if processes := getattr(trainer.strategy.launcher, "procs", None):
            processes.clear()  # which Lightning's thread watches

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the earlier signal handlers."""
        for signal_number, handler in self._previous_handlers.items():
            signal.signal(signal_number, handler)
        self._previous_handlers = {}


def _can_be_left(trainer: L.Trainer, module: L.LightningModule) -> bool:
    """Return whether the state of a run within a validation is that before it, but for averages of the weights.

    After the last step, no resumed run would validate; between two micro-batches, there is nothing to save.
    """
    if trainer.should_stop or any(callback.is_last_step for callback in run_checkpoints(trainer)):
        return False
    others = [callback for callback in trainer.callbacks if not type(callback).__module__.startswith(_OWN)]
    parts = [(module, L.LightningModule), *((callback, L.Callback) for callback in others)]
    prepares = any(is_overridden(hook, part, parent) for part, parent in parts for hook in _PREPARING)
    return not prepares and not private_names.is_accumulating(trainer)


class StopOnNonFiniteLoss(L.Callback):
    """Callback that stops the run if the training loss, or a trained weight, is infinite or NaN.

    Losses and weights are checked before a checkpoint is written: if one rank finds such a number, none writes. One
    process on the CPU reads the loss of each batch. On a GPU the losses stay there, and are read when metrics are
    logged and before a checkpoint, so that the GPU does not have to wait. Several processes read theirs then too, and
    stop together.

    Args:
        every_n_steps: Fewest optimiser steps between two readings on a GPU, or on several processes.
    """

    def __init__(self, every_n_steps: PositiveInt = 10) -> None:
        self.every_n_steps = every_n_steps
        self._steps: list[int] = []  # whose losses have not been read
        self._losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        """Keep the loss, and stop if a reading is due and a loss of any process is not finite."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        at_once = loss.device.type == "cpu" and trainer.world_size == 1
        accumulates = private_names.is_accumulating(trainer)
        self._steps.append(trainer.global_step + accumulates)  # the step in progress is not counted yet
        # A copy, because CUDA graphs use the memory of the loss again.
        self._losses.append(loss.detach() if at_once else loss.detach().clone())
        logged = not accumulates and step_is_logged(trainer)
        enough = self._steps[-1] - self._steps[0] + 1 >= self.every_n_steps
        if at_once or (logged and enough) or len(self._steps) >= _MOST_UNREAD:
            self._check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check before a checkpoint replaces a good one."""
        found = self._bad_loss()
        if not found and not _trained_weights_are_finite(pl_module):
            found = f"a weight was not finite after step {trainer.global_step}"
        _raise_on_all_ranks(trainer, found)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the last steps."""
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        _raise_on_all_ranks(trainer, self._bad_loss())

    def _bad_loss(self) -> str:
        """Read the losses; return the first step whose loss was not finite, in words, or nothing."""
        if not self._steps:
            return ""
        losses = [self._losses[0].item()] if len(self._losses) == 1 else torch.stack(self._losses).tolist()
        bad = [step for step, loss in zip(self._steps, losses, strict=True) if not math.isfinite(loss)]
        if bad:
            return f"the training loss was not finite at step {bad[0]}"
        self._steps, self._losses = [], []
        return ""


def _trained_weights_are_finite(module: torch.nn.Module) -> bool:
    """Return whether the trained weights of this process are finite; of sharded weights, its shards."""
    trained = [p.detach() for p in module.parameters() if p.requires_grad]
    own = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
    return bool(torch.nn.utils.get_total_norm([p for p in own if p.numel()], math.inf).isfinite())


def _raise_on_all_ranks(trainer: L.Trainer, found: str) -> None:
    """Raise the first of what the processes have found, if there is something; call it on all ranks."""
    if not (reason := next(filter(None, gathered(trainer, found)), "")):
        return
    has_last = any(callback.has_last for callback in run_checkpoints(trainer))
    kept = "the last good checkpoint was kept" if has_last else "there is no checkpoint yet"
    raise MisconfigurationException(
        f"{reason}: lower optimizer.lr, clip the gradients (trainer.gradient_clip_val) or warm the rate up; {kept}"
    )
