"""Which parameters decay: matrices do, vectors do not."""

from torch import nn

NamedParameters = list[tuple[str, nn.Parameter]]


def weight_decay_groups(module: nn.Module) -> list[dict]:
    """Splits the trainable parameters of a module into those that decay and those that do not.

    Weight decay is a prior on the matrices that multiply activations. Biases and the gains of normalisation layers,
    all of them vectors, are left alone, as in GPT-3 and most work since. A parameter that is used twice (tied
    embeddings) is listed once.

    Args:
        module: Any module; frozen parameters (`requires_grad=False`) are left out.

    Returns:
        At most two optimiser groups of named parameters. The first has no `weight_decay` key, so that the value given
        in YAML applies to it; the second sets it to zero.
    """
    decayed: NamedParameters = []
    undecayed: NamedParameters = []
    for name, parameter in module.named_parameters():  # yields a shared parameter once
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else undecayed).append((name, parameter))
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
