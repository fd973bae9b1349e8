"""Training of models too large for one device: weights, gradients and optimiser state are sharded (FSDP2).

Each process keeps 1/n of every tensor. The weights of a block are gathered just before the block is used and freed
after it, and its gradients are reduced into the shards. The result is that of one process.

Paper: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023),
https://arxiv.org/abs/2304.11277. Tutorial: https://docs.pytorch.org/tutorials/intermediate/FSDP_tutorial.html
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from lightning_modules.runtime import private_names


def _entered(step: str, context: str) -> Callable[..., Any]:
    """Return a method that runs a step of the module through the outermost unit, in a context of the precision."""

    def enter(self: "FullyShardedStrategy", *args: Any, **kwargs: Any) -> Any:
        with getattr(self.precision_plugin, context)():
            return self._units[0](step, *args, **kwargs)

    return enter


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; each block of a model is a unit that is gathered separately, and the rest is another.

    A checkpoint is one file with whole tensors, as with other strategies: a run can be resumed with any number of
    processes, sharded or not. During a validation or a test each process holds the whole model.

    Args:
        activation_checkpointing: Whether to compute blocks again in the backward pass and keep only their inputs, which
            takes far less memory and about a third more time.
    """

    def __init__(self, activation_checkpointing: bool = False) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.activation_checkpointing = activation_checkpointing

    def setup_environment(self) -> None:
        """Shard over all processes."""
        private_names.set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def shard(self, module: L.LightningModule) -> None:
        """Shard the weights of a module in place; they must be the same on every process."""
        mesh = self.device_mesh["data_parallel"]
        entry, *blocks = self._units = [_Entry(module), *_blocks(module)]
        for block in blocks:
            if self.activation_checkpointing:
                private_names.recompute_in_backward(block)
            fully_shard(block, mesh=mesh)
        fully_shard(entry, mesh=mesh, reshard_after_forward=False)
        # In the backward pass, each unit prefetches the one before it. By default PyTorch prefetches the unit that was
        # used before it, which differs between ranks after a validation: rank 0 alone may have generated samples.
        for place, unit in enumerate(self._units):
            unit.set_modules_to_backward_prefetch([self._units[place - 1]])

    training_step = _entered("training_step", "train_step_context")
    validation_step = _entered("validation_step", "val_step_context")
    test_step = _entered("test_step", "test_step_context")
    predict_step = _entered("predict_step", "predict_step_context")

    def on_validation_start(self) -> None:
        """Gather the whole model, so that one process can use it alone, for example to generate samples."""
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def on_validation_end(self) -> None:
        """Shard the model again."""
        for place, unit in enumerate(self._units):
            unit.set_reshard_after_forward(place > 0, recurse=False)  # the outermost is used until the end of a step
            unit.reshard()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning passes the states of the optimisers, as it does with strategies that do not shard."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint as other strategies do: check its checksums, and run no code from it."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of a whole checkpoint into the shards."""
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state of an optimiser on rank 0, as one process would; an empty one on the other ranks."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps it
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return _renamed(state, {name: i for i, name in enumerate(self._names(optimizer))})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of the optimisers of a whole checkpoint into the shards."""
        options = StateDictOptions(full_state_dict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of the parameters in the order by which the optimiser numbers their states."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def require_whole_weights(trainer: L.Trainer, callback: str) -> None:
    """Refuse a sharded run, for a callback that uses whole weights during the training.

    Raises:
        MisconfigurationException: If the weights are sharded.
    """
    if isinstance(trainer.strategy, FullyShardedStrategy):
        raise MisconfigurationException(
            f"{callback} needs whole weights, and the strategy shards them over the processes; train with "
            "experiments/trainer/ddp.yaml in place of fsdp.yaml, or leave the callback out"
        )


class _Entry(nn.Module):
    """Outermost unit: its `forward` runs a step of the module, after the weights outside the blocks are gathered."""

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, step)(*args, **kwargs)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of lists of layers, inner lists first."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    for layers in reversed(lists):
        yield from (layer for layer in layers if any(True for _ in layer.parameters()))


def _renamed(state: Mapping[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the state of an optimiser with other keys for its parameters."""
    groups = [group | {"params": [new[key] for key in group["params"]]} for group in state.get("param_groups", [])]
    return {"state": {new[key]: value for key, value in state.get("state", {}).items()}, "param_groups": groups}
