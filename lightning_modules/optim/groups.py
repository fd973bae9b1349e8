"""Which parameters decay: matrices do, vectors do not; and which learn slower than others."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def weight_decay_groups(module: nn.Module, lr_shares: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Splits the trainable parameters of a module into those that decay and those that do not.

    Weight decay is a prior on the matrices that multiply activations. Biases and the gains of normalisation layers,
    all of them vectors, are left alone, as in GPT-3 and most work since. A parameter that is used twice (tied
    embeddings) is listed once.

    Args:
        module: Any module; frozen parameters (`requires_grad=False`) are left out.
        lr_shares: Share of the optimiser's learning rate, by the name of the parameter; 1 for those not there.

    Returns:
        At most two optimiser groups of named parameters for each share, the largest first. The first of the two has no
        `weight_decay` key, so that the value given in YAML applies to it; the second sets it to zero. A share other
        than 1 stands in the group as `lr_share`.
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
