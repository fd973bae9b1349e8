"""Models too large for one device: weights, gradients and optimiser state shared out among the processes (FSDP2).

Each process keeps 1/n of every tensor. A block's weights are gathered just before the block is used and dropped after
it, and its gradients are summed straight into their shares. What is computed is what one process computes.

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
from torch.distributed._composable import checkpoint as recompute_in_backward
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer


def _entered(step: str, context: str) -> Callable[..., Any]:
    """A step of the module, entered by way of the outermost unit, as `Strategy` has it for a module on its own."""

    def enter(self: "FullyShardedStrategy", *args: Any, **kwargs: Any) -> Any:
        with getattr(self.precision_plugin, context)():
            return self._units[0](step, *args, **kwargs)

    return enter


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
        self._units = [_Entry(module), *_blocks(module)]
        entry, *blocks = self._units
        for block in blocks:
            if self.activation_checkpointing:
                recompute_in_backward(block)
            fully_shard(block, mesh=mesh)
        fully_shard(entry, mesh=mesh, reshard_after_forward=False)
        # Going backward, each unit sends for the one before it. Left to itself, PyTorch sends for the one that was used
        # before it, which after a validation is not the same on all processes: one alone may have written samples.
        for place, unit in enumerate(self._units):
            unit.set_modules_to_backward_prefetch([self._units[place - 1]])

    training_step = _entered("training_step", "train_step_context")
    validation_step = _entered("validation_step", "val_step_context")
    test_step = _entered("test_step", "test_step_context")
    predict_step = _entered("predict_step", "predict_step_context")

    def on_validation_start(self) -> None:
        """Gathers the whole model, so that processes may use it each on its own: to write samples, say."""
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def on_validation_end(self) -> None:
        """Shares it out again."""
        for place, unit in enumerate(self._units):
            unit.set_reshard_after_forward(place > 0, recurse=False)  # the outermost is needed to the end of a step
            unit.reshard()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

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


def require_whole_weights(trainer: L.Trainer, callback: str) -> None:
    """Refuses a run whose weights are shared out, for a callback that works on whole ones in training.

    Args:
        trainer: The run's.
        callback: Name of the callback.

    Raises:
        MisconfigurationException: If each process has a share of every weight.
    """
    if isinstance(trainer.strategy, FullyShardedStrategy):
        raise MisconfigurationException(
            f"{callback}: it needs whole weights, and the strategy shares them out among the processes; train with "
            "experiments/trainer/ddp.yaml in place of fsdp.yaml, or leave the callback out"
        )


class _Entry(nn.Module):
    """The outermost unit: whatever a step uses of the model, and by which of its methods, is gathered as it begins."""

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, step)(*args, **kwargs)


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
