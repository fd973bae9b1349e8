"""Callbacks that every topic can name in YAML."""

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn


def validates_a_fit(trainer: L.Trainer) -> bool:
    """Whether the validation in progress belongs to a training, and is no sanity check before it."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
