"""The linear layers of a network, of whichever library."""

from torch import nn

_TRANSPOSED = "Conv1D"  # by name, because importing it from transformers takes seconds


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, `nn.Linear` and GPT-2's `Conv1D`."""
    kinds = ("Linear", _TRANSPOSED)
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}


def is_transposed(layer: nn.Module) -> bool:
    """Return whether the weight of a linear layer is (in, out), as in `Conv1D`, and not (out, in)."""
    return type(layer).__name__ == _TRANSPOSED
