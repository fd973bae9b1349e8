"""Numbers of the trainer with which a run does not do what they say, refused before the run has a folder.

Lightning refuses others itself. With these it fails within the training, or trains without a word on something else: a
negative `gradient_clip_val` turns the gradient round.
"""

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

_TRAINS_NOTHING_AT_0 = ("max_steps", "max_epochs", "limit_train_batches")
_LEAST = {
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}


def check(trainer: Namespace | Mapping[str, Any], trains: bool) -> None:
    """Refuse a number of the trainer that it does not work with.

    Args:
        trainer: Parsed arguments of the trainer.
        trains: Whether the command trains.

    Raises:
        MisconfigurationException: If there is one.
    """
    if found := _refusal(trainer, trains):
        raise MisconfigurationException(f"trainer.{found}")


def _refusal(trainer: Namespace | Mapping[str, Any], trains: bool) -> str | None:
    if (n_batches := trainer["accumulate_grad_batches"]) < 1:
        return f"accumulate_grad_batches is {n_batches}: give 1 or more"
    if not trains:  # a recorded run is evaluated all the same
        return None
    for name, least in _LEAST.items():
        if (value := trainer[name]) is not None and value < least:
            return f"{name} is {value}: give {least} or more"
    for name in _TRAINS_NOTHING_AT_0:
        if trainer[name] == 0:
            return f"{name} is 0, so that nothing would be trained: leave it out, or give more than 0"
    interval, by_epoch = trainer["val_check_interval"], trainer["check_val_every_n_epoch"] is not None
    if interval == 0:
        return (
            "val_check_interval is 0: give the number of training batches between two validations; for no validation, "
            "leave it out and give --trainer.limit_val_batches 0"
        )
    if isinstance(interval, float) and not by_epoch:
        return (
            f"val_check_interval is {interval}, a share of an epoch, and this run does not count epochs: give a "
            "whole number of training batches, or also --trainer.check_val_every_n_epoch 1"
        )
    return None
