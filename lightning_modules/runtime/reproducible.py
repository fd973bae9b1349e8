"""Steps that are a function of the seed and their number alone, so that a resumed run repeats an uninterrupted one."""

import os

import lightning as L
import torch

from lightning_modules.runtime import private_names

_SEED_STRIDE = 1_000_003  # primes, so that seed, batch and rank hardly ever fall on the same number
_BATCH_STRIDE = 4_099


class ReproducibleSteps(L.Callback):
    """Puts the data where a resumed run left it, and seeds the random numbers of every batch.

    The order of the data is a function of (seed, epoch), see `datamodules.base.GlobalBatches`; here a resumed run skips
    the batches that are behind it. The random numbers of a batch (dropout) are a function of (seed, batch, rank). With
    both, a run that was killed at any step ends with the same weights, bit for bit, as one that was not. Neither the
    state of a loader nor that of a random number generator needs to be saved.

    Args:
        seed: Base seed of the steps; `null` takes the run's `seed_everything`.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Skips the batches of the current epoch that a restored checkpoint has behind it."""
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # set by seed_everything
        done = private_names.batches_done_in_epoch(trainer)
        if 0 < done < trainer.num_training_batches:
            for loader in private_names.train_dataloaders(trainer):
                # A stream has no positions to sample: there it is the dataset that knows the order.
                order = loader.sampler if hasattr(loader.sampler, "skip") else loader.dataset
                order.set_epoch(trainer.current_epoch)
                order.skip = done
            private_names.restart_fetching(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seeds the batch."""
        batch_seed = self.seed * _SEED_STRIDE + private_names.batches_done(trainer)
        seed = batch_seed * _BATCH_STRIDE + trainer.global_rank
        # torch.manual_seed does the same for every kind of device, and takes a millisecond to note who asked.
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
