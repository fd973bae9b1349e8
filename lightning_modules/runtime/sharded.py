"""Training of models too large for one device: weights, gradients and optimiser state are sharded (FSDP2).

Each process keeps 1/n of every tensor. The weights of a block are gathered just before the block is used and freed
after it, and its gradients are reduced into the shards. The result is that of one process.

Papers: Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023),
https://arxiv.org/abs/2304.11277; Micikevicius et al., "Mixed Precision Training" (2018),
https://arxiv.org/abs/1710.03740. Tutorial: https://docs.pytorch.org/tutorials/intermediate/FSDP_tutorial.html
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.optim import Optimizer

from lightning_modules.common.messages import say
from lightning_modules.models.linear_layers import linear_layers
from lightning_modules.runtime import private_names, shards
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.processes import gathered


def _evaluated(step: str) -> Callable[..., Any]:
    """Return a method that runs a step of an evaluation through the outermost unit."""

    def evaluate(self: "FullyShardedStrategy", *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.forward_context(), self.taking_part():
            return self._outer[0](step, *args, **kwargs)

    return evaluate


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; each block of a model is a unit that is gathered separately, and the rest is another.

    The training, a validation, a test and predictions gather a block at a time. Callbacks that generate text use the
    whole model; each process holds it for that time only (see `whole_model`).

    A checkpoint is one file with whole tensors, as with other strategies: a run can be resumed with any number of
    processes, sharded or not.

    `trainer.precision` chooses what is stored and gathered:

    - `32-true`: float32 everywhere.
    - `bf16-mixed`: shards, gradients between processes and optimiser state are float32. The weights of linear layers
      are gathered in bfloat16, the type in which autocast would use them. All others (embeddings, norms) are gathered
      in float32. So the numbers are those of `bf16-mixed` without sharding.
    - `bf16-true`: weights, optimiser state and gradients are bfloat16, and the processes add gradients up in float32.
      This takes half the memory, but there is no copy of the weights in float32: a step that changes a weight by less
      than 1/512 of it is rounded away.

    Args:
        activation_checkpointing: Whether to compute blocks again in the backward pass and keep only their inputs, which
            takes far less memory and about a third more time.
        cpu_offload: Whether the shards and the optimiser state are in the memory of the host, where the optimiser steps
            too. A GPU then holds activations and gathered blocks only.
        sync_every_batch: Whether the processes add up gradients after each batch of `accumulate_grad_batches`. `false`
            adds up once an optimiser step, which saves communication, but each process holds whole gradients in
            float32 until then.
        whole_model: Whether each process may hold the whole model while samples are generated. `false` leaves out the
            callbacks that need it, and says so.
        save_distributed_checkpoint: Whether each process saves its share of a checkpoint in a file of its own, for a
            model that is too large for the memory of one machine. `model/` is not written then. Every layout can load
            such a checkpoint; `llm-train convert` makes one file of it.
    """

    def __init__(
        self,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        sync_every_batch: bool = True,
        whole_model: bool = True,
        save_distributed_checkpoint: bool = False,
    ) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)
        self.saves_shards = save_distributed_checkpoint
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload
        self.sync_every_batch = sync_every_batch
        self.gathers_whole_model = whole_model
        self._outer: list[FSDPModule] = []  # the outermost units, which are gathered for the whole of a step
        self._blocks: list[FSDPModule] = []
        self._order: list[FSDPModule] = []  # in which an evaluation uses the blocks
        self._is_evaluating = False
        self._left_out: set[str] = set()  # callbacks
        self._has_loaded_shares = False

    # --- processes ----------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Shard over all processes."""
        private_names.set_data_parallel_size(self, self.num_nodes * self.num_processes)
        if self.cpu_offload and self.root_device.type == "cuda":
            private_names.set_process_group_backend(self, "cpu:gloo,cuda:nccl")  # norms of gradients on the host
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Set up model and optimisers; evaluate without `torch.inference_mode`.

        Weights that were first gathered in that mode could not be used in training.
        """
        in_fit = trainer.fit_loop.epoch_loop.val_loop
        for loop in (in_fit, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move the model to the device, without its shards if they stay in the memory of the host."""
        if self.cpu_offload:
            private_names.move_all_but_shards(self.model, self.root_device)
        else:
            super().model_to_device()

    # --- units --------------------------------------------------------------------------------------------------------

    def shard(self, module: L.LightningModule) -> None:
        """Shard the weights of a module in place; they must be the same on every process."""
        is_mixed = self.precision_plugin.precision == "bf16-mixed"
        rounded = weights_of_products(module) if is_mixed else set(module.parameters())
        self._blocks = [block for block in _blocks(module) if not rounded.isdisjoint(block.parameters())]
        for block in self._blocks:
            rounded.update(block.parameters(recurse=False))  # only the unit of a block can gather its own parameters
        exact = {parameter for parameter in module.parameters() if parameter not in rounded}
        with_exact = [part for part in module.modules() if not exact.isdisjoint(part.parameters(recurse=False))]
        for block in self._blocks:
            if self.activation_checkpointing:
                private_names.recompute_in_backward(block)
            self._make_unit(block, torch.bfloat16 if is_mixed else None, exact)
        entry = _Entry(module)
        self._outer = [self._make_unit(entry, torch.bfloat16 if is_mixed else None, exact, is_outer=True)]
        if exact:
            sharded = set(module.parameters()) - exact
            self._outer.insert(0, self._make_unit(_Entry(entry, with_exact), None, sharded, is_outer=True))
        # In the backward pass, each unit prefetches the one before it. By default PyTorch prefetches the unit that was
        # used before it, which differs between ranks after a validation: rank 0 alone may have generated samples.
        units = [*self._outer, *self._blocks]
        for place, unit in enumerate(units):
            unit.set_modules_to_backward_prefetch([units[place - 1]])
        self._order = [part for part in module.modules() if part in self._blocks]

    def _make_unit(
        self, part: nn.Module, dtype: torch.dtype | None, others: set[nn.Parameter], is_outer: bool = False
    ) -> FSDPModule:
        """Shard the weights of a part, except those of other units.

        Args:
            part: Part of the model.
            dtype: Number type in which the weights are gathered and used; `None` means that of the shards.
            others: Parameters that belong to other units.
            is_outer: Whether the gathered weights are kept from the forward to the backward pass.
        """
        return fully_shard(
            part,
            mesh=self.device_mesh["data_parallel"],
            reshard_after_forward=not is_outer,
            # Autocast chooses the types of activations.
            mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy(self.root_device.type == "cuda") if self.cpu_offload else OffloadPolicy(),
            ignored_params=others or None,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a training step through the outermost unit."""
        with self.precision_plugin.train_step_context():
            return self._outer[0]("training_step", *args, **kwargs)

    validation_step = _evaluated("validation_step")
    test_step = _evaluated("test_step")
    predict_step = _evaluated("predict_step")

    @contextmanager
    def taking_part(self) -> Iterator[None]:
        """Gather each block once within the context, also if this process has no share of a batch and runs none.

        All processes must gather the same blocks in the same order.
        """
        used: list[FSDPModule] = []
        hooks = [block.register_forward_pre_hook(lambda block, _: used.append(block)) for block in self._blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if not used:
            for block in self._order:
                block.unshard()
                block.reshard()
        else:
            self._order = used

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep the gradients of a batch on this process, if the next one adds to them."""
        if self.sync_every_batch:
            yield
            return
        self._outer[0].set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._outer[0].set_requires_gradient_sync(True)

    def on_validation_start(self) -> None:
        """Do what the first step of the module does once, on all processes, one of which may have no share of it.

        The outermost weights stay gathered, so that callbacks can use them, and evaluate the module too.
        """
        self._is_evaluating = True
        with self.precision_plugin.forward_context():
            self._outer[0]("before_compilation")

    def on_validation_end(self) -> None:
        """Free the gathered weights."""
        self._is_evaluating = False
        for unit in self._outer:
            unit.reshard()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Gather the whole model within the context, so that one process can use it alone; enter it on every process.

        The weights have the types in which the training uses them.
        """
        for unit in [*self._outer, *self._blocks]:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        is_mixed = self.precision_plugin.precision == "bf16-mixed"
        try:
            with self.precision_plugin.forward_context() if is_mixed else nullcontext():
                yield
        finally:
            for unit in self._blocks:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()
            for unit in () if self._is_evaluating else self._outer:
                unit.reshard()

    def say_left_out(self, callback: str) -> None:
        """Say once that a callback is left out because it needs the whole model."""
        if callback not in self._left_out:
            self._left_out.add(callback)
            say(f"{callback} is left out: it needs the whole model, and trainer.strategy.whole_model is false")

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning passes the states of the optimisers, as it does with strategies that do not shard."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint: on rank 0 one with whole tensors, or the share of each process (see `shards.py`)."""
        if not self.saves_shards:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        file = Path(self.broadcast(filepath))
        folder = shards.new_folder(file, checkpoint["global_step"], self.broadcast(uuid.uuid4().hex[:8]))
        rest, tensors = shards.taken_apart(checkpoint)
        mine = {"state_dict": shards.share(tensors, self.global_rank)}
        files = AtomicCheckpointIO()
        files.save_checkpoint(mine, folder / f"{self.global_rank}.ckpt")
        self.barrier()
        if self.is_global_zero:
            rest[shards.SHARDS] = {"folder": folder.name, "n": self.world_size}
            files.save_checkpoint(rest, file)
            files.remove_unused_shards(file.parent)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint as other strategies do: check its checksums, and run no code from it.

        Of a checkpoint in shards, a process reads its rows only. The processes share the work of checking the files,
        and all refuse a checkpoint that one of them finds damaged.

        Raises:
            MisconfigurationException: If the checkpoint is damaged, not a checkpoint, or holds pickled code.
        """
        self._has_loaded_shares = False
        if not isinstance(self.checkpoint_io, AtomicCheckpointIO):
            return self.checkpoint_io.load_checkpoint(checkpoint_path)
        rest, files = self._load_parts(self.checkpoint_io, checkpoint_path)
        self._has_loaded_shares = bool(files)
        if not files:
            return rest
        weights = self.model.state_dict()
        parameters = dict(self.model.named_parameters())
        of_optimizers = [[parameters[name] for name in self._names(optimizer)] for optimizer in self.optimizers]
        tensors = {}
        for place in files[0]:
            kind, _, name = place.partition("/")
            if kind == "state_dict":
                tensors[place] = shards.rows_like(files, place, weights.get(name, torch.empty(0)))
            elif of_optimizers:  # not in an evaluation
                number, parameter, _ = name.split("/")
                own = dict(enumerate(of_optimizers[int(number)]))  # may be fewer; then the weights are refused
                tensors[place] = shards.rows_like(files, place, own.get(int(parameter), torch.empty(0)))
        return shards.put_together(rest, tensors)

    def _load_parts(self, io: AtomicCheckpointIO, path: str | Path) -> tuple[dict[str, Any], list[shards.Tensors]]:
        parts, error = ({}, []), ""
        try:  # the processes of a machine map the same memory
            parts = io.load_parts(path, self.global_rank, self.world_size, map_location="cpu", mmap=True)
        except MisconfigurationException as found:
            error = str(found)
        if errors := list(filter(None, gathered(self.lightning_module.trainer, error))):
            raise MisconfigurationException(errors[0])
        return parts

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights in the memory of the host: whole on rank 0 and none on the others, or sharded."""
        options = StateDictOptions(full_state_dict=not self.saves_shards, cpu_offload=True)
        return get_model_state_dict(self.model, options=options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights of a checkpoint into the shards."""
        state = dict(checkpoint["state_dict"])
        if not self._has_loaded_shares:
            # Not by `full_state_dict`, which refuses shards on the host beside buffers on a GPU.
            own = self.model.state_dict()
            state = {name: shards.sharded_as(own[name], part) if name in own else part for name, part in state.items()}
        set_model_state_dict(self.model, state, options=StateDictOptions(strict=strict))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimiser, numbered as on one process; it is whole on rank 0, or sharded."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps it
        options = StateDictOptions(full_state_dict=not self.saves_shards, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return _renamed(state, {name: i for i, name in enumerate(self._names(optimizer))})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of the optimisers of a checkpoint into the shards."""
        options = StateDictOptions(full_state_dict=not self._has_loaded_shares)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of the parameters in the order by which the optimiser numbers their states."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def saves_shards(trainer: L.Trainer) -> bool:
    """Return whether the checkpoints of a run are in shards."""
    return isinstance(trainer.strategy, FullyShardedStrategy) and trainer.strategy.saves_shards


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


@contextmanager
def evaluating(trainer: L.Trainer) -> Iterator[None]:
    """Run an `evaluation_step` of the module in this context if a callback calls it, on all processes together."""
    strategy = trainer.strategy
    is_sharded = isinstance(strategy, FullyShardedStrategy)
    with trainer.precision_plugin.forward_context(), strategy.taking_part() if is_sharded else nullcontext():
        yield


@contextmanager
def whole_model(trainer: L.Trainer, user: str) -> Iterator[bool]:
    """Gather the whole model within the context if it is sharded; enter it on every process.

    A callback that runs the module at the end of a validation, on one process alone or a different number of times on
    each, does so in this context.

    Args:
        trainer: Trainer of the run.
        user: What uses the model, such as the name of a callback.

    Yields:
        Whether the model may be used: not if the strategy has `whole_model: false`, which is said once for each user.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, FullyShardedStrategy):
        yield True
    elif strategy.gathers_whole_model:
        with strategy.whole_model():
            yield True
    else:
        strategy.say_left_out(user)
        yield False


class _Entry(nn.Module):
    """Outermost unit: its `forward` runs a step of the module, after the weights outside the blocks are gathered.

    Args:
        module: The module, or another entry, within this one.
        parts: Further parts whose weights this unit gathers.
    """

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.module = module
        self.parts = nn.ModuleList(parts)

    def forward(self, step: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.module, _Entry):
            return self.module(step, *args, **kwargs)
        return getattr(self.module, step)(*args, **kwargs)


def weights_of_products(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that autocast rounds: those of linear layers, without matrices that embed tokens too."""
    embeddings = {p for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    return {p for layer in linear_layers(module).values() for p in layer.parameters(recurse=False)} - embeddings


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of lists of layers, inner lists first."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    for layers in reversed(lists):
        yield from (layer for layer in layers if any(True for _ in layer.parameters()))


def _renamed(state: Mapping[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the state of an optimiser with other keys for its parameters."""
    groups = [group | {"params": [new[key] for key in group["params"]]} for group in state.get("param_groups", [])]
    return {"state": {new[key]: value for key, value in state.get("state", {}).items()}, "param_groups": groups}
