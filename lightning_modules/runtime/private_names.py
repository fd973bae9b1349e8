"""Every touch of a name that Lightning keeps to itself, gathered here; a test holds each of them.

Lightning 2.6 has no public way to resume in mid-epoch at the right batch, to know whether gradients are being
accumulated, or to switch off its own handling of SIGTERM, which hangs with several processes.
"""

import lightning as L
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader


def batches_done_in_epoch(trainer: L.Trainer) -> int:
    """Number of batches of the current epoch that are behind us, as restored from a checkpoint."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def batches_done(trainer: L.Trainer) -> int:
    """Number of batches of the whole run that are behind us, over all epochs."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def train_dataloaders(trainer: L.Trainer) -> list[DataLoader]:
    """The dataloaders of the fit in progress."""
    return trainer.fit_loop._combined_loader.flattened


def restart_fetching(trainer: L.Trainer) -> None:
    """Makes the fit in progress ask its dataloaders for a new iterator."""
    iter(trainer.fit_loop._data_fetcher)


def is_accumulating(trainer: L.Trainer) -> bool:
    """Whether the batch just done left gradients that no optimiser step has used yet."""
    return trainer.fit_loop._should_accumulate()


def takes_unused_parameters(trainer: L.Trainer) -> bool:
    """Whether a step may leave out some of the trained parameters, for which DDP otherwise waits."""
    strategy = trainer.strategy
    return not isinstance(strategy, DDPStrategy) or bool(strategy._ddp_kwargs.get("find_unused_parameters"))


def leave_sigterm_to_us() -> None:
    """Takes out Lightning's per-batch broadcast of SIGTERM, which costs a sync a batch and hangs when ranks differ."""
    _TrainingEpochLoop._broadcast_sigterm_tensor = lambda self: None
