"""Values of all processes of a run."""

from typing import Any

import lightning as L
import torch


def gathered(trainer: L.Trainer, value: Any) -> list[Any]:
    """Return the value of each process, ordered by rank; call it on all ranks with a value that can be pickled."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values
