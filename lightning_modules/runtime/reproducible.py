"""Training steps that depend on the seed and the step only, so that a resumed run repeats an uninterrupted one."""

import os

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_modules.runtime import private_names
from lightning_modules.runtime.stages import validates_a_fit

_SEED_STRIDE = 1_000_003  # primes, so that different (seed, batch, rank) almost never give the same number
_BATCH_STRIDE = 4_099


class ReproducibleSteps(L.Callback):
    """Callback that skips the batches that a resumed run has done, and seeds the random numbers of every batch.

    The order of the data is a function of (seed, epoch), see `datamodules.base.GlobalBatches`. The random numbers of a
    batch (dropout), and of a validation after it, are a function of (seed, batch, rank). So a run that was killed at
    any step and resumed ends with the same weights, bit for bit, as an uninterrupted one; the states of loaders and of
    random number generators are not saved.

    Args:
        seed: Base seed of the steps; `null` takes `seed_everything`.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Skip the batches of the current epoch that the last optimiser step before the checkpoint had used."""
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # set by seed_everything
        before, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, _batches_a_step(trainer)
        private_names.go_back_to_last_step(trainer)
        private_names.begin_next_epoch(trainer)
        private_names.end_epoch_of_checkpoint(trainer)
        trainer.accumulate_grad_batches = before  # the scheduler of Lightning takes no other before an epoch begins
        done = private_names.batches_done_in_epoch(trainer)
        if trainer.global_step and done < trainer.num_training_batches:  # resumed, and not at the end of an epoch
            for loader in private_names.train_dataloaders(trainer):
                # A stream has no positions to sample; there the dataset holds the order.
                order = loader.sampler if hasattr(loader.sampler, "skip") else loader.dataset
                order.set_epoch(trainer.current_epoch)
                order.skip = done
            private_names.restart_fetching(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed the random numbers of the batch, and set the accumulation, which an epoch that is resumed lacks."""
        trainer.accumulate_grad_batches = _batches_a_step(trainer)
        private_names.count_step_of_checkpoint(trainer)
        self._seed_random_numbers(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed the random numbers of a validation, and log one within an optimiser step with the step before."""
        if validates_a_fit(trainer):  # which a resumed run may begin with
            self._seed_random_numbers(trainer, pl_module)
        if private_names.is_accumulating(trainer):
            private_names.shift_logged_step(trainer, -1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Undo it, before the checkpoint of the validation."""
        if private_names.is_accumulating(trainer):
            private_names.shift_logged_step(trainer, 1)

    def _seed_random_numbers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batch_seed = (self.seed or 0) * _SEED_STRIDE + private_names.batches_done(trainer)
        seed = (batch_seed * _BATCH_STRIDE + trainer.global_rank) % 2**64  # of any size; torch takes 64 bits
        # torch.manual_seed does the same for every device, but takes a millisecond to record its caller.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def _batches_a_step(trainer: L.Trainer) -> int:
    """Return the number of batches of an optimiser step in this epoch."""
    schedulers = [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]
    if not schedulers:
        return trainer.accumulate_grad_batches
    return schedulers[-1].get_accumulate_grad_batches(trainer.current_epoch)
