"""Parameter groups of the optimiser: weight decay for matrices but not for vectors, and separate learning rates."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def weight_decay_groups(module: nn.Module, lr_shares: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module into groups with and without weight decay.

    Weight decay is a prior on the matrices that multiply activations. Biases and the gains of norms, which are vectors,
    do not decay, as in GPT-3 and most later work. A parameter that is used twice (tied embeddings) is listed once.

    Args:
        module: Any module; frozen parameters (`requires_grad=False`) are skipped.
        lr_shares: Learning rates by parameter name, as shares of the optimiser's learning rate; 1 for other parameters.

    Returns:
        Up to two optimiser groups of named parameters for each share, in descending order of the share. The first has
        no `weight_decay` key, so that the value of the YAML applies to it; the second sets it to zero. A share other
        than 1 is stored in the group as `lr_share`.
    """
    lr_shares = lr_shares or {}
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():  # yields a shared parameter once
        if parameter.requires_grad:
            groups.setdefault((lr_shares.get(name, 1.0), parameter.ndim >= 2), []).append((name, parameter))
    return [
        {"params": parameters}
        | ({} if decays else {"weight_decay": 0.0})
        | ({} if share == 1.0 else {"lr_share": share})
        for (share, decays), parameters in sorted(groups.items(), reverse=True)
    ]
