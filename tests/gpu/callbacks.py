"""Callbacks that tests add to a run."""

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.overrides import TorchFunctionMode
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
# Methods that copy to the host: of a tensor on the CPU, they call no operation.
_COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu}


class NoSync(L.Callback):
    """Callback that refuses operations for which the host waits for the device, in steps without logging.

    On a GPU, CUDA itself finds them. On the CPU, the operations that would wait on a GPU are refused by name.

    Args:
        first: Optimiser steps before the first that is checked; optimisers make their state in step 1.
    """

    checked = 0  # steps of the last run

    def __init__(self, first: int = 1) -> None:
        self.first, self._modes, self._has_refused = first, contextlib.ExitStack(), False
        NoSync.checked = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Refuse from here on."""
        if trainer.global_step < self.first or (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            return
        NoSync.checked += 1
        if pl_module.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        else:
            self._modes.enter_context(_RefuseReads(self._refuse))
            self._modes.enter_context(_RefuseCopies(self._refuse))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Allow what follows."""
        if pl_module.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        self._modes.close()

    def _refuse(self, what: str) -> None:
        if not self._has_refused:  # what follows an error reads values too
            self._has_refused = True
            raise RuntimeError(f"{what}: the host would wait for the device")

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Allow what follows, for the next run of this process."""
        self.on_train_batch_end(trainer, pl_module)


def _makes_mask_of_transformers() -> bool:
    """Return whether Transformers is looking at a mask, which it does on the CPU; on a GPU CUDA would refuse it."""
    return any(frame.filename.endswith("transformers/masking_utils.py") for frame in traceback.extract_stack(limit=12))


class _RefuseReads(TorchDispatchMode):
    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (name in _READS or by_mask) and not _makes_mask_of_transformers():
            self._refuse(f"{name}{' by a mask' * by_mask}")
        return func(*args, **(kwargs or {}))


class _RefuseCopies(TorchFunctionMode):
    """Refuses copies to the host; `to` only with the name of the CPU, for the device of a module can be another."""

    def __init__(self, refuse: Callable[[str], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        targets = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)]
        if func in _COPIES or (func is torch.Tensor.to and "cpu" in targets):
            self._refuse(func.__name__)
        return func(*args, **kwargs)
