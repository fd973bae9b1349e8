"""The optimisers that cannot train the modules of this project, and arguments with which one or a schedule fails."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_modules.common.messages import first_line
from lightning_modules.runtime.private_names import built_class

_REASONS: dict[type[Optimizer], str] = {
    LBFGS: "it takes one parameter group, and computes the loss many times a step; a run has two groups, and one loss "
    "a step. Give AdamW",
    SparseAdam: "it takes sparse gradients only, and those of a run are dense. Give Adam",
}
_LIBRARIES = ("torch", "transformers")


def check_optimizer(factory: Callable) -> None:
    """Refuse an optimiser that fails at its first step.

    Args:
        factory: What builds it; a function that names no class is not checked.

    Raises:
        MisconfigurationException: If it is one, or a subclass of one.
    """
    kind = built_class(factory)
    for unusable, reason in _REASONS.items():
        if kind is not None and issubclass(kind, unusable):
            raise MisconfigurationException(f"optimizer: {kind.__name__} cannot train here: {reason}")


def check_arguments(optimizer: Optimizer, device: torch.device) -> None:
    """Refuse an optimiser whose arguments are such that it fails at its first step.

    Raises:
        MisconfigurationException: If it has no learning rate, or one of its switches is for another use.
    """
    group = optimizer.param_groups[0]
    if "lr" not in group:
        raise MisconfigurationException(
            f"optimizer: {type(optimizer).__name__} has no lr in its parameter groups, where the schedule sets it; "
            "pass it to torch.optim.Optimizer by this name, as in super().__init__(params, {'lr': lr})"
        )
    if group["lr"] is None:  # that of Transformers' Adafactor is by default
        raise MisconfigurationException(
            "optimizer: lr is null; set it to a number, for Adafactor with --optimizer.relative_step false"
        )
    if group.get("differentiable"):
        raise MisconfigurationException("optimizer: differentiable is for steps that are differentiated; leave it out")
    if group.get("capturable") and not group.get("fused") and device.type == "cpu":
        raise MisconfigurationException("optimizer: capturable is for CUDA graphs, not for a CPU; leave it out")


@contextmanager
def refusals(section: str, kind: type | None) -> Iterator[None]:
    """Raise what an optimiser or a schedule raises because of its arguments as one line that names the section.

    Args:
        section: `optimizer` or `lr_scheduler`.
        kind: Its class, if it is known.

    Raises:
        MisconfigurationException: For a `ValueError`, which refuses an argument, and for any error that a class of a
            library or of this project meets in a library. Another error is in the code of the user.
    """
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"{section}: {error}") from error
    except Exception as error:
        *_, (place, _) = traceback.walk_tb(error.__traceback__)
        if kind is None or _package(kind.__module__) not in (*_LIBRARIES, "lightning_modules"):
            raise
        if _package(str(place.f_globals.get("__name__"))) not in _LIBRARIES:
            raise
        raise MisconfigurationException(
            f"{section}: {kind.__name__} does not work with these arguments: {first_line(error)}"
        ) from error


def _package(module: str) -> str:
    return module.partition(".")[0]
