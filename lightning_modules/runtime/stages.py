"""Tests of the part of a run that is in progress."""

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn


def validates_a_fit(trainer: L.Trainer) -> bool:
    """Return whether a validation of a training run is in progress, other than the sanity check before it."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
