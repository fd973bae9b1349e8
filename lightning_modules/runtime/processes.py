"""Values of all processes of a run."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import lightning as L
import torch

_Value = TypeVar("_Value")

_LONG = timedelta(weeks=1)


def gathered(trainer: L.Trainer, value: Any) -> list[Any]:
    """Return the value of each process, ordered by rank; call it on all ranks with a value that can be pickled."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def from_first(trainer: L.Trainer, compute: Callable[[], _Value]) -> _Value:
    """Return on all ranks what rank 0 computes, for work that may take hours; the value can be pickled.

    The ranks wait in a process group of their own: an operation of the run's group fails after its timeout, which is
    half an hour by default.
    """
    if trainer.world_size == 1:
        return compute()
    group = torch.distributed.new_group(backend="gloo", timeout=_LONG)
    values = [compute() if trainer.is_global_zero else None]
    torch.distributed.broadcast_object_list(values, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    return values[0]  # type: ignore[return-value]
