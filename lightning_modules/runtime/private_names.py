"""All uses of private names of Lightning, jsonargparse, torchmetrics, W&B, Transformers and PyTorch; each has a test.

Lightning 2.6 has no public way to resume an epoch at the right batch, to stop or save between two steps, to test
whether gradients are being accumulated, or to switch off its own handling of SIGTERM, which hangs with several
processes.
"""

import signal
import subprocess
import threading
import weakref
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import lightning as L
import torch
from jsonargparse._common import default_import_path_denylist, parsing_settings
from jsonargparse._parameter_resolvers import get_signature_parameters
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer import trainer as trainer_module
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed._composable import checkpoint as recompute_in_backward
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

if TYPE_CHECKING:  # imported where they are used: they are slow to import
    import wandb
    from transformers import PreTrainedModel

__all__ = ["recompute_in_backward"]

# --- Lightning's loops ------------------------------------------------------------------------------------------------


def batches_done_in_epoch(trainer: L.Trainer) -> int:
    """Return the number of batches done in the current epoch, as restored from a checkpoint."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def batches_done(trainer: L.Trainer) -> int:
    """Return the number of batches done in the whole run, over all epochs."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def train_dataloaders(trainer: L.Trainer) -> list[DataLoader]:
    """Return the dataloaders of the fit in progress."""
    return trainer.fit_loop._combined_loader.flattened


def restart_fetching(trainer: L.Trainer) -> None:
    """Create new iterators of the dataloaders of the fit in progress."""
    iter(trainer.fit_loop._data_fetcher)


def is_accumulating(trainer: L.Trainer) -> bool:
    """Return whether the last batch left gradients that no optimiser step has used yet."""
    return trainer.fit_loop._should_accumulate()


def batches_of_step(trainer: L.Trainer) -> int:
    """Return the number of batches whose gradients the next optimiser step uses, in a step of the last of them."""
    return batches_done_in_epoch(trainer) % trainer.accumulate_grad_batches or trainer.accumulate_grad_batches


def go_back_to_last_step(trainer: L.Trainer) -> None:
    """Count only the batches up to the last optimiser step as done, when a run is resumed.

    A validation, and its checkpoint, may fall between the batches of one optimiser step. The gradients of the batches
    since the step before are not in the checkpoint.
    """
    loop = trainer.fit_loop.epoch_loop
    surplus = batches_done_in_epoch(trainer) % trainer.accumulate_grad_batches
    if surplus and is_accumulating(trainer):
        for counts in (loop.batch_progress.current, loop.batch_progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, getattr(counts, name) - surplus)
        # Lightning would skip a validation that it takes for that of the checkpoint, and count its step.
        loop.reset_restart_stage()
        shift_logged_step(trainer, -1)


def shift_logged_step(trainer: L.Trainer, by: int) -> None:
    """Change the step that loggers are given; Lightning counts it up after the validation that follows a step."""
    trainer.fit_loop.epoch_loop._batches_that_stepped += by


def count_step_of_checkpoint(trainer: L.Trainer) -> None:
    """Give loggers the number of finished steps, before a batch, where a resumed run is one behind.

    Lightning counts the step of a checkpoint that was written after a validation when it skips that validation. That of
    the last step of a run (see `RunCheckpoint`) is none in a run that goes on longer.
    """
    if trainer.fit_loop.epoch_loop._batches_that_stepped == trainer.global_step - 1:
        shift_logged_step(trainer, 1)


def begin_next_epoch(trainer: L.Trainer) -> None:
    """Begin the next epoch, when a run is resumed from a checkpoint that was written between two epochs.

    If `max_steps` limits the run, Lightning takes an epoch that is complete for one in progress.
    """
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.ready == epochs.completed:
        trainer.fit_loop.epoch_loop.restarting = False
        trainer.fit_loop.epoch_loop.batch_progress.reset_on_run()


def end_epoch_of_checkpoint(trainer: L.Trainer) -> None:
    """End the epoch of a checkpoint that was written after its last batch, when a run is resumed.

    Lightning does so if a validation is due after this batch. Otherwise it trains on a batch more: the batch was the
    last of a shorter run, and validated as such (see `RunCheckpoint`).
    """
    loop = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress
    if loop.restarting and batches.is_last_batch and batches.current.completed == batches.current.ready:
        make_validation_due(trainer)


def make_validation_due(trainer: L.Trainer) -> None:
    """Let Lightning validate after the batch in progress, whatever the interval of the validations."""
    loop = trainer.fit_loop.epoch_loop
    is_due = loop._should_check_val_fx

    def is_due_once(data_fetcher: Any) -> bool:
        loop._should_check_val_fx = is_due
        return True

    loop._should_check_val_fx = is_due_once


def call_after_steps(trainer: L.Trainer, function: Callable[[L.Trainer], None]) -> None:
    """Call a function after each optimiser step, when callbacks, loggers and a validation after it have seen it.

    After the last step of an epoch, it is called when the epoch has ended. A checkpoint of that moment resumes exactly.
    A function that is given again, by a second fit of the trainer, is called once.
    """
    epochs, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop
    functions = vars(epochs).setdefault("called_after_steps", [])
    if function in functions:
        return
    functions.append(function)
    if len(functions) > 1:
        return  # the loops call all of them since the first
    end_epoch, end_batch = epochs.on_advance_end, batches.on_advance_end

    def after_batch(data_fetcher: Any) -> None:
        end_batch(data_fetcher)
        is_resumed_validation = batches.val_loop.restarting  # of the step of the checkpoint, before the first batch
        if not trainer.is_last_batch and not is_resumed_validation and not is_accumulating(trainer):
            call_all()

    def after_epoch() -> None:
        end_epoch()
        call_all()

    def call_all() -> None:
        for function in functions:
            function(trainer)

    batches.on_advance_end, epochs.on_advance_end = after_batch, after_epoch


def call_before_steps(trainer: L.Trainer, function: Callable[[L.Trainer], None]) -> None:
    """Call a function before the first step of the fit that begins, when all callbacks have seen the training start."""
    loop = trainer.fit_loop
    start = loop.on_run_start

    def start_and_call() -> None:
        loop.on_run_start = start
        start()
        function(trainer)

    loop.on_run_start = start_and_call


def validate_again(trainer: L.Trainer) -> None:
    """Run the validation after which a checkpoint seems to have been written, before the first step of a resumed run.

    The loops stay as they are, those of a run whose validation has ended.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    before = loop.restarting, loop._has_run
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    loop.restarting, loop._has_run = before


def training_is_done(trainer: L.Trainer) -> bool:
    """Return whether the step that has ended was the last of the training."""
    return trainer.fit_loop.done


def computed_metrics(trainer: L.Trainer) -> dict[str, Tensor]:
    """Return the metrics that are computed; `Trainer.callback_metrics` computes the others, on all ranks together."""
    return trainer._logger_connector._callback_metrics


def leave_sigterm_alone(trainer: L.Trainer) -> None:
    """Keep Lightning from handling SIGTERM: it exits with code 0, and its broadcasts hang if ranks are not in step."""
    connector = trainer._signal_connector
    register = type(connector).register_signal_handlers

    def register_others() -> None:
        handler = signal.getsignal(signal.SIGTERM)
        register(connector)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)

    connector.register_signal_handlers = register_others
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def unscale_gradients(trainer: L.Trainer) -> None:
    """Divide gradients in float16 by the factor of their scaler, for optimisers that Lightning leaves it to."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        for optimizer in trainer.optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                scaler.unscale_(optimizer)


def leave_unused_gpus_alone() -> None:
    """Make Lightning keep the random states of GPUs around its sanity check only if they are in use.

    Otherwise it starts CUDA on each GPU of the machine, in a run on the CPU too.
    """
    trainer_module.isolate_rng = lambda: isolate_rng(include_cuda=torch.cuda.is_initialized())


# --- Lightning's strategies -------------------------------------------------------------------------------------------


def takes_unused_parameters(trainer: L.Trainer) -> bool:
    """Return whether a step may give no gradient to some trained parameters; by default DDP waits for all gradients."""
    strategy = trainer.strategy
    return not isinstance(strategy, DDPStrategy) or bool(strategy._ddp_kwargs.get("find_unused_parameters"))


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of processes that share the weights, once it is known."""
    strategy._data_parallel_size = size


def set_process_group_backend(strategy: ModelParallelStrategy, backend: str) -> None:
    """Set the backend of the processes, once their device is known."""
    strategy._process_group_backend = backend


def move_all_but_shards(module: L.LightningModule, device: torch.device) -> None:
    """Move the buffers and metrics of a module to a device, and leave its sharded parameters where they are."""
    module._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(device))
    _update_properties(module, device=device)


# --- the command line -------------------------------------------------------------------------------------------------


class SettingsGoOverCheckpoint(LightningCLI):
    """A LightningCLI in which the YAML and the flags are not overridden by the hyper-parameters of a checkpoint."""

    def _parse_ckpt_path(self) -> None:
        """Do nothing."""

    def resolved(self, with_linked: bool = False) -> dict[str, Any]:
        """Return the configuration as plain values."""
        raise NotImplementedError

    def _dump_config(self) -> None:
        """Set what Lightning gives the module and the data as their hyper-parameters.

        Lightning's own method validates the configuration once more, which takes a tenth of the start of a run.
        """
        if not hasattr(self, "config_dump"):
            self.config_dump = self.resolved(with_linked=True)

    def parser_of(self, subcommand: str) -> LightningArgumentParser:
        """Return the parser of a subcommand."""
        return self._subcommand_parsers[subcommand]


def option_names(parser: ArgumentParser) -> list[str]:
    """Return the names of the options of a parser."""
    return [action.dest for action in parser._actions]


def default_classes(parser: ArgumentParser) -> dict[str, dict[str, Any]]:
    """Return the defaults of a parser that are classes, as they were given: `class_path`, and named `init_args`."""
    defaults = {action.dest: action.default for action in parser._actions}
    return {name: value for name, value in defaults.items() if isinstance(value, dict) and "class_path" in value}


def argument_names(constructed: type) -> set[str]:
    """Return the names of the arguments of a class, also of those that its `**kwargs` pass on to its bases."""
    return {parameter.name for parameter in get_signature_parameters(constructed)}


# Standard modules that run commands, write files or unpickle: entries of the verdicts below.
NEVER_IMPORTED: tuple[str, ...] = default_import_path_denylist


@contextmanager
def restricted_imports(verdicts: Mapping[str, bool]) -> Iterator[None]:
    """Set which names in configurations can be imported in the block.

    Args:
        verdicts: Whether an import path and the names below it are allowed; the longest entry decides, and `*` is for
            those without an entry.
    """
    before = dict(parsing_settings)
    parsing_settings.update(import_path_verdicts=dict(verdicts), import_paths_enforced=True)
    try:
        yield
    finally:
        parsing_settings.update({name: before[name] for name in ("import_path_verdicts", "import_paths_enforced")})


def built_class(factory: Any) -> type | None:
    """Return the class that a factory builds, or `None` if it does not say.

    Args:
        factory: A class, a `partial` of one, a factory of jsonargparse, or another callable.
    """
    if not isinstance(factory, partial):
        return factory if isinstance(factory, type) else None
    # The class is an argument of jsonargparse's function.
    return next((part for part in (factory.func, *factory.args) if isinstance(part, type)), None)


# --- metrics ----------------------------------------------------------------------------------------------------------


class KeepsDtypes(Metric):
    """A metric whose states move with the module, and keep their dtypes when the module is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Self:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        return super()._apply(move, exclude_state)


# --- modules ----------------------------------------------------------------------------------------------------------


class KeepsBufferDtypes(L.LightningModule):
    """A module whose own buffers move with it, and keep their dtypes when the module is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


# --- Weights & Biases -------------------------------------------------------------------------------------------------


class OpenWandbLogger(WandbLogger):
    """A WandbLogger whose run can be set up after the logger is built, and replaced."""

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `wandb.init`; change them before the run starts."""
        return self._wandb_init

    def store_in(self, folder: str) -> None:
        """Keep the files of the run in a folder."""
        self._wandb_init["dir"] = self._save_dir = folder

    def continue_run(self, run_id: str) -> None:
        """Continue the W&B run of an id."""
        self._wandb_init["id"] = self._id = run_id

    @property
    def run(self) -> Any:
        """The W&B run, or `None` if it has not started."""
        return self._experiment

    @run.setter
    def run(self, run: Any) -> None:
        self._experiment = run


def use_artifact(run: "wandb.Run", artifact: "wandb.Artifact") -> None:
    """Log an artifact as an input of a run, as `Run.use_artifact` does, which refuses offline runs."""
    run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)


def wandb_service() -> subprocess.Popen[bytes] | None:
    """Return the process of this one to which W&B's runs send what they log, or `None` if it must not be killed.

    It can be killed from wandb 0.31 on, which writes what is logged every few seconds. `wandb.teardown`, the public way
    to end it, waits until it has uploaded everything.
    """
    import wandb
    from wandb.sdk.wandb_setup import singleton

    if "x_transaction_log_flush_interval" not in wandb.Settings.model_fields:
        return None
    connection = singleton()._connection
    return connection._proc._process if connection is not None and connection.owns_service else None


# --- Transformers -----------------------------------------------------------------------------------------------------


def attention_implementation(model: "PreTrainedModel") -> str | None:
    """Return the name of the attention that a model of Transformers runs, such as `sdpa` for torch's kernels."""
    return configured_attention(model.config)


def configured_attention(config: Any) -> str | None:
    """Return the name of the attention that a configuration of Transformers asks for."""
    return config._attn_implementation


def takes_static_caches(model: "PreTrainedModel") -> bool:
    """Return whether a model of Transformers is right with keys and values beyond the last position, under a mask."""
    return model._can_compile_fullgraph


# --- PyTorch ----------------------------------------------------------------------------------------------------------

# One kernel for a whole list of tensors; torch 2.11 has no public name for these.
foreach_add_ = torch._foreach_add_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_


def make_size_a_variable(tensor: Tensor, dimension: int) -> None:
    """Make the size of a dimension a variable of the functions that `torch.compile` compiles for the tensor."""
    from torch._dynamo import maybe_mark_dynamic  # here, because the import takes a second

    maybe_mark_dynamic(tensor, dimension)


def finds_cpp_compiler() -> bool:
    """Return whether `torch.compile` finds the C++ compiler that it needs for a CPU."""
    from torch._inductor import cpp_builder, exc  # here, because the import takes seconds

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return attention within sequences that follow one another, (N, H, D) in half precision, on a GPU.

    `torch.nn.attention.varlen.varlen_attn` has no dropout.

    Args:
        query: (N, H, D), N the length of all sequences together.
        key: As `query`.
        value: As `query`.
        cu_seqlens: 0 and the end of each sequence, int32.
        longest: Length of the longest sequence, or more.
        dropout: Probability of dropping an attention weight, in [0, 1).
        is_causal: Whether a position attends to earlier ones only.
        scale: Factor on the dot products; `None` means 1 / √D.
        sliding_window: Number of positions that each attends to, itself included; `None` means all.
    """
    window = {} if sliding_window is None else {"window_size_left": sliding_window - 1, "window_size_right": 0}
    return torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, dropout, is_causal, False, scale=scale, **window
    )[0]


# --- PyTorch's tensors without data -----------------------------------------------------------------------------------


def without_data() -> AbstractContextManager:
    """Return a context in which tensors have shapes and no memory, whatever their device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def has_data(tensor: Tensor) -> bool:
    """Return whether a tensor has values; those that are made under `without_data` have none."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(tensor, FakeTensor)


@contextmanager
def memory_watched() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the largest memory, in bytes, that tensors made in the context have had at once."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    known: set[int] = set()  # identities of the storages that are counted
    now = most = 0

    def forget(identity: int, size: int) -> None:
        nonlocal now
        known.remove(identity)
        now -= size

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal now, most
            given = set(map(id, storages((args, kwargs))))
            result = func(*args, **(kwargs or {}))
            for storage in storages(result):
                if id(storage) not in known | given:
                    known.add(id(storage))
                    now += storage.nbytes()
                    weakref.finalize(storage, forget, id(storage), storage.nbytes())
            most = max(most, now)
            return result

    def storages(values: Any) -> list[torch.UntypedStorage]:
        return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

    with Watch():
        yield lambda: most


def kept_by_compiled(function: Callable[..., Tensor], *args: Any) -> tuple[int, int]:
    """Return the bytes that the compiled forward pass keeps for the backward pass, and those of its largest tensor.

    The function is traced and divided as `torch.compile` does for a GPU, and not run; its arguments may have no data.
    """
    from torch._dynamo import reset
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    kept: dict[int, int] = {}
    largest = 0

    class TracedError(Exception):
        """Ends the compilation."""

    def count(graph: torch.fx.GraphModule, _: object) -> None:
        nonlocal largest
        largest = max(storage.nbytes() for storage in storages(graph.graph.nodes))
        inputs = set(map(id, storages(graph.graph.find_nodes(op="placeholder"))))
        (output,) = graph.graph.find_nodes(op="output")
        for storage in storages(output.args[0]):
            if id(storage) not in inputs:
                kept[id(storage)] = storage.nbytes()
        raise TracedError

    def storages(nodes: Iterable[Any]) -> list[torch.UntypedStorage]:
        values = [node.meta.get("val") for node in nodes if isinstance(node, torch.fx.Node)]
        return [value.untyped_storage() for value in values if isinstance(value, Tensor)]

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    try:
        torch.compile(function, backend=backend)(*args)
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, TracedError):
            raise
    finally:
        reset()
    return sum(kept.values()), largest
