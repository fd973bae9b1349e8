"""Callbacks that tests add to a run."""

import traceback
from typing import Any

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host must read before it goes on: values, and shapes that depend on values.
_READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "bincount",
}


class NoSync(L.Callback):
    """Callback that refuses operations for which the host waits for the device, in steps without logging.

    On a GPU, CUDA itself finds them. On the CPU, the operations that would wait on a GPU are refused by name.

    Args:
        first: Optimiser steps before the first that is checked; optimisers make their state in step 1.
    """

    checked = 0  # steps of the last run

    def __init__(self, first: int = 1) -> None:
        self.first, self._mode = first, None
        NoSync.checked = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Refuse from here on."""
        if trainer.global_step < self.first or (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            return
        NoSync.checked += 1
        if pl_module.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        else:
            self._mode = _RefuseReads().__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Allow what follows."""
        if pl_module.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        elif self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Allow what follows, for the next run of this process."""
        self.on_train_batch_end(trainer, pl_module)


def _makes_mask_of_transformers() -> bool:
    """Return whether Transformers is looking at a mask, which it does on the CPU; on a GPU CUDA would refuse it."""
    return any(frame.filename.endswith("transformers/masking_utils.py") for frame in traceback.extract_stack(limit=12))


class _RefuseReads(TorchDispatchMode):
    refused = False  # what follows an error reads values too

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (name in _READS or by_mask) and not self.refused and not _makes_mask_of_transformers():
            self.refused = True
            raise RuntimeError(f"{name}{' by a mask' * by_mask}: the host would wait for the device")
        return func(*args, **(kwargs or {}))
