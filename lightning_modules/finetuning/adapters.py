"""Low-rank adapters (LoRA) for any model, added by the `peft` library, and the model with the adapters merged.

A linear layer keeps its weight W (out, in), which is frozen, and adds a product of two low-rank matrices:

    y = W x + alpha / rank · B A x,    A: (rank, in), random at the start;  B: (out, rank), zero at the start

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), https://arxiv.org/abs/2106.09685
"""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def add_adapters(
    model: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    also_trained: Collection[str] = (),
) -> None:
    """Freeze a model and add adapters to some of its linear layers, in place.

    Args:
        model: Model to change.
        targets: Full names of the layers: `nn.Linear`, or GPT-2's `Conv1D`.
        rank: Rank of the adapters, at least 1.
        alpha: The output of an adapter is multiplied by `alpha / rank`.
        dropout: Probability that an input of an adapter is dropped in training.
        also_trained: Full names of parameters of the model that are not frozen.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")  # peft sets it for Conv1D, and warns
        inject_adapter_in_model(config, model)
    for name, parameter in plain_parameters(model).items():
        parameter.requires_grad = name in also_trained


def adapter_settings(model: nn.Module) -> dict[str, Any] | None:
    """Return the arguments with which `add_adapters` makes the adapters of a model, or `None` if it has none."""
    layers: dict[str, Any] = adapted_layers(model)
    if not layers:
        return None
    layer = next(iter(layers.values()))
    return {
        "targets": list(layers),
        "rank": layer.r["default"],
        "alpha": layer.lora_alpha["default"],
        "dropout": getattr(layer.lora_dropout["default"], "p", 0.0),  # no dropout is an identity
        "also_trained": [name for name, parameter in plain_parameters(model).items() if parameter.requires_grad],
    }


def name_for_patterns(name: str) -> str:
    """Return the name by which a pattern selects a parameter: that in the model without adapters.

    The matrices of an adapter are `query.lora_A.default` and `query.lora_B.default`: `*.query.*` selects them, and
    `*.weight` does not.
    """
    return name.removesuffix(".weight") if ".lora_" in name else name.replace(".base_layer.", ".")


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that are not of adapters, by their names in the model without adapters."""
    return {name_for_patterns(name): parameter for name, parameter in model.named_parameters() if ".lora_" not in name}


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge the adapters of a model into its weights within the context, so that it is a plain model.

    An adapted output layer that shares its matrix with the embeddings gets a matrix of its own, because the adapter
    changes the scores and not the embeddings. Merging and unmerging change the weights by rounding errors; load them
    again if they must be exact afterwards.
    """
    layers = adapted_layers(model)
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared: dict[Any, nn.Parameter] = {}
    for name, layer in layers.items():
        plain = layer.get_base_layer()
        if uses[id(plain.weight)] > 1:
            shared[plain] = plain.weight
            plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=plain.weight.requires_grad)
        layer.merge()
        model.set_submodule(name, plain)
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()] if shared else []
    tied = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
    for config in tied:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for config in tied:
            config.tie_word_embeddings = True
        for name, layer in layers.items():
            model.set_submodule(name, layer)
            layer.unmerge()
        for plain, weight in shared.items():
            plain.weight = weight
