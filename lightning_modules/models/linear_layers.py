"""The linear layers of a network, of whichever library."""

from torch import nn


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by name, `nn.Linear` and GPT-2's `Conv1D`."""
    kinds = ("Linear", "Conv1D")  # by name, because importing Conv1D from transformers takes seconds
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
