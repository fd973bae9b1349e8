"""The optimisers of torch that cannot train the modules of this project."""

from collections.abc import Callable

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_modules.runtime.private_names import built_class

_REASONS: dict[type[Optimizer], str] = {
    LBFGS: "it takes one parameter group, and computes the loss many times a step; a run has two groups, and one loss "
    "a step. Give AdamW",
    SparseAdam: "it takes sparse gradients only, and those of a run are dense. Give Adam",
}


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
