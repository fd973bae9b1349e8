"""Parameter groups of the optimiser: weight decay for matrices but not for vectors, and separate learning rates."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_modules.finetuning.selection import ModelParts
from lightning_modules.models.linear_layers import is_transposed, linear_layers


class ParameterGroups(list[dict[str, Any]]):
    """Optimiser groups of named parameters, which also say which parameters are matrices of hidden layers.

    Attributes:
        hidden_matrices: Names of these parameters, for an optimiser that treats them differently.
        stacked: Names of the parameters that stack several matrices, with the number of rows of each.
        transposed: Names of the matrices whose rows are the inputs of their layer, and not its outputs.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        hidden_matrices: Iterable[str],
        stacked: Mapping[str, Sequence[int]] | None = None,
        transposed: Iterable[str] = (),
    ) -> None:
        super().__init__(groups)
        self.hidden_matrices = frozenset(hidden_matrices)
        self.stacked = dict(stacked or {})
        self.transposed = frozenset(transposed)


def weight_decay_groups(module: nn.Module, lr_shares: Mapping[str, float] | None = None) -> ParameterGroups:
    """Split the trainable parameters of a module into groups with and without weight decay.

    Weight decay is a prior on the matrices that multiply activations. Biases and the gains of norms, which are vectors,
    do not decay, as in GPT (Radford et al., 2018) and most later work. A parameter that is used twice (tied embeddings)
    is listed once.

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
    return ParameterGroups(
        (
            {"params": parameters}
            | ({} if decays else {"weight_decay": 0.0})
            | ({} if share == 1.0 else {"lr_share": share})
            for (share, decays), parameters in sorted(groups.items(), reverse=True)
        ),
        hidden_matrices(module),
        stacked_matrices(module),
        transposed_matrices(module),
    )


def hidden_matrices(module: nn.Module) -> list[str]:
    """Return the names of the matrices of the hidden layers of a module.

    These are the two-dimensional parameters of its layers (see `ModelParts`) that are not embeddings. Parameters before
    the layers (embeddings of tokens and positions) and after them (the output matrix, a classifier) are not included.
    """
    embeddings = {p for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    layers = ModelParts(module).layers
    return [name for layer in layers for name, p in layer.items() if p.ndim == 2 and p not in embeddings]


def stacked_matrices(module: nn.Module) -> dict[str, Sequence[int]]:
    """Return the names of the weights that stack several matrices, with the number of rows of each.

    The layers of our decoder say so in their attribute `stacked_rows`, by the names of their linear layers.
    """
    parts = ((name, getattr(part, "stacked_rows", None)) for name, part in module.named_modules())
    return {
        f"{name}.{linear}.weight".lstrip("."): rows
        for name, stacked in parts
        if isinstance(stacked, dict)
        for linear, rows in stacked.items()
    }


def transposed_matrices(module: nn.Module) -> list[str]:
    """Return the names of the weights (in, out) of GPT-2's `Conv1D`; those of other linear layers are (out, in)."""
    return [f"{name}.weight" for name, layer in linear_layers(module).items() if is_transposed(layer)]
