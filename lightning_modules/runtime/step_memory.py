"""The memory of a training step, computed without that memory: its operations run on tensors that have no data."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.base import ExperimentModule
from lightning_modules.optim import weight_decay_groups
from lightning_modules.runtime import private_names
from lightning_modules.runtime.sharded import weights_of_products

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}  # the type of the weights


class StepMemory(NamedTuple):
    """What a training step needs in memory on one device, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    copies: int  # of weights of linear layers, in the type that autocast rounds them to; the backward pass needs them
    activations: int  # what else the forward pass keeps for the backward pass, and working memory beyond the rest

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def step_memory(
    module: ExperimentModule, batch: dict[str, Tensor], precision: str, accumulates: bool = False
) -> StepMemory:
    """Return the memory of a training step of a module that was built without data, and is changed.

    Without compilation, the tensors that forward and backward pass make are counted at each operation. Compiled, the
    copies and activations are what the forward pass keeps when it is divided as `torch.compile` does, and twice its
    largest tensor: the input and the output of an operation.

    Args:
        module: Module, its weights included, made under `private_names.without_data`.
        batch: Batch of a training step, made in the same context.
        precision: The `trainer.precision` of the run.
        accumulates: Whether the gradients of earlier batches are there in the forward pass.
    """
    module.train()
    module.zero_grad()  # of another estimate
    module.before_compilation()
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    gradients = size_of(*trained)
    low = _AUTOCAST.get(precision)
    context = torch.autocast("cpu", low) if low else contextlib.nullcontext()
    if module.compile_mode:
        with context:
            kept, largest = private_names.kept_by_compiled(module.loss, batch)
        activations = kept + 2 * largest
    if module.compile_mode or accumulates:
        for weight in trained:
            weight.grad = torch.empty_like(weight)
    if not module.compile_mode:
        with private_names.memory_watched() as most:
            with context:
                loss = module.loss(batch)
            loss = loss if isinstance(loss, Tensor) else loss.value
            loss.backward()
            del loss
            activations = most() if accumulates else max(0, most() - gradients)
    assert module.optimizer_factory is not None  # the command has set it
    optimizer = module.optimizer_factory(weight_decay_groups(module, {}))
    optimizer.step()
    state = [value for of_weight in optimizer.state.values() for value in of_weight.values()]
    states = size_of(*(value for value in state if isinstance(value, Tensor)))
    rounded = low.itemsize * sum(weight.numel() for weight in weights_of_products(module)) if low else 0
    copies = min(rounded, activations)  # a step with few tokens frees some before the gradients are all there
    weights = size_of(*module.parameters(), *module.buffers())
    return StepMemory(weights, gradients, states, copies, activations - copies)


def size_of(*tensors: Tensor) -> int:
    """Return the bytes of tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
