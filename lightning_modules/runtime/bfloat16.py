"""bfloat16 on a CPU: fast if the processor has matrix units for it (AMX), and many times slower than float32 if not."""

import time
from functools import cache

import lightning as L
import torch

_SIZE = 256  # of the matrices that are timed: a product in float32 takes less than a millisecond
_SLOW = 2.0  # times as long as in float32


def has_matrix_units(device: torch.device) -> bool:
    """Return whether a device has matrix units for bfloat16, as GPUs have; on a CPU they are the instructions AMX."""
    return device.type != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16"))


def advice(trainer: L.Trainer) -> str | None:
    """Return a line for the user if a run in bfloat16 would be slow, or `None`."""
    if trainer.strategy.root_device.type != "cpu" or "bf16" not in str(trainer.precision):
        return None
    times = time_against_float32()
    if times < _SLOW:
        return None
    return (
        f"trainer.precision {trainer.precision}: this processor multiplies matrices {times:.0f} times slower in "
        "bfloat16 than in float32; --trainer.precision 32-true is faster"
    )


@cache
def time_against_float32() -> float:
    """Return the time of a matrix product in bfloat16 on the CPU, in times of one in float32; it is measured."""
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    times = []
    for _ in range(3):  # the first has what is done once
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return min(times)
