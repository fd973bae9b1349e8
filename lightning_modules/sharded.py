"""Models too large for one device: weights, gradients and optimiser state shared out among the processes (FSDP2).

Each process keeps 1/n of every tensor. A block's weights are gathered just before the block is used and dropped after
it, and its gradients are summed straight into their shares. What is computed is what one process computes.

Paper: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023),
https://arxiv.org/abs/2304.11277. Tutorial: https://docs.pytorch.org/tutorials/intermediate/FSDP_tutorial.html
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed._composable import checkpoint as recompute_in_backward
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; the units that are gathered are the blocks of a model, and what lies around them.

    Checkpoints are those of every other strategy, one file with whole tensors: a run can go on with any number of
    processes, sharded or not. While a model is validated or tested, each process has the whole of it.

    Args:
        activation_checkpointing: Whether blocks are computed again in the backward pass, so that only what enters them
            need be kept: far less memory, about a third more time.
    """

    def __init__(self, activation_checkpointing: bool = False) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.activation_checkpointing = activation_checkpointing

    def setup_environment(self) -> None:
        """Shares among all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, module: L.LightningModule) -> None:
        """Shares out the weights of a module, in place; every process must have the same ones.

        Args:
            module: Not sharded yet.
        """
        mesh = self.device_mesh["data_parallel"]
        for block in _blocks(module):
            if self.activation_checkpointing:
                recompute_in_backward(block)
            fully_shard(block, mesh=mesh)
        named = type(module)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        # PyTorch has given it a class of its own, which stays known by its name: in checkpoints, in messages.
        for attribute in ("__module__", "__qualname__", "__name__"):
            setattr(type(module), attribute, getattr(named, attribute))
        # A step may use the model by any of its methods: what lies around the blocks is gathered when a step begins.
        register_fsdp_forward_method(module, "training_step")

    def on_validation_start(self) -> None:
        """Gathers the whole model, so that processes may use it each on its own: to write samples, say."""
        for module in self._sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def on_validation_end(self) -> None:
        """Shares it out again."""
        blocks = set(_blocks(self.lightning_module))
        for module in self._sharded():
            module.set_reshard_after_forward(module in blocks, recurse=False)
            module.reshard()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands us the states of the optimisers, as it does to strategies that do not shard."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the file as any strategy does: compared with its checksums, and running no code of it.

        Args:
            checkpoint_path: File.
            weights_only: Always true.
        """
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes each process's share of the weights.

        Args:
            checkpoint: What `load_checkpoint` returned.
            strict: Whether all names must match.
        """
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as the optimiser of one process has it, on the first process; nothing on the others.

        Args:
            optimizer: One of ours.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps it
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return _renamed(state, {name: i for i, name in enumerate(self._names(optimizer))})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes each process's share of the optimisers' states.

        Args:
            checkpoint: What `load_checkpoint` returned.
        """
        options = StateDictOptions(full_state_dict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of the parameters in the optimiser's own order, by which it numbers their states."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of lists of layers, inner lists first."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    for layers in reversed(lists):
        yield from (layer for layer in layers if any(True for _ in layer.parameters()))


def _renamed(state: Mapping[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    """The state of an optimiser with other keys for its parameters."""
    return {
        "state": {new[key]: value for key, value in state.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [new[key] for key in group["params"]]} for group in state.get("param_groups", [])
        ],
    }
