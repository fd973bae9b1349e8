"""Low-rank adapters (LoRA) in any model, through the `peft` library, and the model with them folded in again.

A linear layer keeps its matrix W (out, in), frozen, and adds a product of two thin ones that are trained:

    y = W x + alpha / rank · B A x,    A: (rank, in), drawn at random;  B: (out, rank), zero at first

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), https://arxiv.org/abs/2106.09685
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


def add_adapters(model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freezes a model and gives some of its linear layers adapters, in place.

    Args:
        model: Any module.
        targets: Full names of the layers: `nn.Linear`, or GPT-2's `Conv1D`.
        rank: Rank of the adapters, at least 1.
        alpha: What the adapters add is multiplied by `alpha / rank`.
        dropout: Share of an adapter's input that is dropped in training, in [0, 1).
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")  # peft finds out which way round Conv1D is
        inject_adapter_in_model(config, model)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that have adapters, by name.

    Args:
        model: Any module.
    """
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name, GPT-2's `Conv1D` among them.

    Args:
        model: Any module.
    """
    kinds = ("Linear", "Conv1D")  # by name: importing transformers for the sake of the second takes seconds
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within the context the model is a plain one again, with what the adapters add folded into its matrices.

    Folding in and out rounds: who needs the very weights afterwards loads them again.

    Args:
        model: Any module, with or without adapters.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
            layer.unmerge()
