"""Tests of the part of a run that is in progress."""

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden


def validates_a_fit(trainer: L.Trainer) -> bool:
    """Return whether a validation of a training run is in progress, other than the sanity check before it."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def step_is_logged(trainer: L.Trainer) -> bool:
    """Return whether the metrics of the last optimiser step that is done are written (`trainer.log_every_n_steps`)."""
    every = trainer.log_every_n_steps
    return every > 0 and trainer.global_step % every == 0


def lacks_validation(trainer: L.Trainer) -> bool:
    """Return whether a training run that has begun never validates, although its module can."""
    if not is_overridden("validation_step", trainer.lightning_module):
        return False
    has_no_data = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)
    return trainer.limit_val_batches == 0 or has_no_data
