"""Base classes of the modules: optimiser and schedule from YAML, the evaluation protocol, checkpoints."""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from lightning_modules.finetuning.adapters import adapted_layers, adapter_settings, add_adapters
from lightning_modules.optim import (
    OptimizerFactory,
    OptimizerSettings,
    ScheduleFactory,
    build_schedule,
    check_arguments,
    refusals,
    weight_decay_groups,
)
from lightning_modules.runtime import private_names
from lightning_modules.runtime.batches import explained_entries
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.sharded import FullyShardedStrategy

# Whether to compile the loss, and the mode of `torch.compile`; `true` is its default mode.
CompileMode = bool | Literal["reduce-overhead", "max-autotune"]


class Loss(NamedTuple):
    """The loss of a batch, if `train/loss` is another number: all are scalars."""

    value: Tensor  # is differentiated
    mean: Tensor  # is logged, after averaging over micro-batches and ranks
    weight: Tensor  # of this batch in that average, such as its number of targets


class ExperimentModule(L.LightningModule):
    """Base of the modules.

    A subclass builds its network, names the metric of a split with `track`, and implements `loss` and
    `evaluation_step`. Training step, validation, test, optimiser, schedule, gradient norm and checkpoints come with
    this class.

    The command sets `optimizer_factory` and `schedule_factory` from the `optimizer:` and `lr_scheduler:` of the YAML,
    and `data`. To use a module without the command, set them, or override `configure_optimizers`.

    Args:
        compile: Whether to compile the function `loss`, and so the forward and backward pass of a training step, with
            `torch.compile`: `true` for its default mode, `reduce-overhead` for CUDA graphs, which small models need,
            or `max-autotune`, with CUDA graphs and a search for fast kernels. The first step then takes a minute or
            more. Validation and generation are not compiled. CUDA graphs are refused where the sizes of batches vary.
    """

    optimizer_factory: OptimizerFactory | None = None
    schedule_factory: ScheduleFactory | None = None
    # Dimensions of the entries of a batch whose sizes vary in training. They are variables in a compiled loss; each
    # other size is a constant, and a new one compiles the loss again.
    varying_sizes: ClassVar[Mapping[str, int]] = {}
    # Settings that `next_command` needs as well if flags give them, such as `data.source`.
    settings_of_next: ClassVar[Sequence[str]] = ()
    compile_backend = "inductor"
    _data: Any = None

    def __init__(self, compile: CompileMode = False) -> None:
        super().__init__()
        self.compile_mode = compile
        self._compiled_loss: Callable[[Any], Tensor | Loss] | None = None
        self.result_files: list[Path] = []  # that callbacks wrote in an evaluation; the closing lines name them
        self.learning_rate_shares: dict[str, float] = {}  # by parameter, 1 for others; a constructor may set it
        self.scaled_rates: dict[str, float] = {}  # by parameter, of callbacks; see `scale_learning_rates`
        self._losses_of_step: list[Tensor] = []
        self.val_metrics: Metric | None = None
        self.test_metrics: Metric | None = None

    # --- data ---------------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Any:
        """The datamodule, set before the run starts; modules and callbacks document which attributes of it they read.

        Raises:
            MisconfigurationException: If it is not set.
        """
        if self._data is None:
            raise MisconfigurationException(f"{type(self).__name__}.data is not set: set it to the datamodule")
        return self._data

    @data.setter
    def data(self, data: Any) -> None:
        self._data = data

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that shares the data and the factories; callbacks that average weights copy modules."""
        memo |= {id(shared): shared for shared in (self._data, self.optimizer_factory, self.schedule_factory)}
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        object.__setattr__(copied, "__dict__", copy.deepcopy(self.__getstate__(), memo))  # without the trainer
        return copied

    @staticmethod
    def linked(**values: Any) -> tuple[Any, ...]:
        """Return the values of arguments that are linked from the data, in the order given.

        Raises:
            MisconfigurationException: If one is `None`, because the data has no such attribute.
        """
        if missing := [name for name, value in values.items() if value is None]:
            raise MisconfigurationException(
                f"model: {', '.join(missing)} must be set; the datamodule has no attribute of that name to link"
            )
        return tuple(values.values())

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def track(self, metrics: Metric) -> None:
        """Set the metric that `evaluation_step` updates in a validation; a test updates a copy of it."""
        self.val_metrics, self.test_metrics = metrics, metrics.clone()

    def evaluation_step(self, batch: Any, metrics: Any) -> None:
        """Update the metrics with a batch of the validation or test split.

        On several processes, the last batch of a process may be empty.
        """
        raise NotImplementedError(f"{type(self).__name__} has no evaluation_step")

    def evaluation_results(self, metrics: Any, split: str) -> Mapping[str, Tensor]:
        """Return the results of a split by name, such as `loss`; they are logged as `val/loss` or `test/loss`."""
        return metrics.compute()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the test metrics."""
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: Any, metrics: Metric | None) -> None:
        if metrics is None:
            raise MisconfigurationException(f"{type(self).__name__}: call self.track(metric) in the constructor")
        with explained_entries(batch, type(self).__name__):
            self.evaluation_step(batch, metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the results of the validation as `val/...`."""
        self._log_results("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the results of the test as `test/...`."""
        self._log_results("test", self.test_metrics)

    def _log_results(self, split: str, metrics: Metric | None) -> None:
        if metrics is None:
            return
        results = {f"{split}/{name}": value for name, value in self.evaluation_results(metrics, split).items()}
        # torchmetrics has reduced the results over the processes; sync_dist tells Lightning that they are all equal.
        self.log_dict(results, sync_dist=True)
        metrics.reset()

    # --- training -----------------------------------------------------------------------------------------------------

    def loss(self, batch: Any) -> Tensor | Loss:
        """Return the loss of a batch: a scalar, in nats, or a `Loss`.

        This function is compiled: it computes with tensors only, has no effect, and depends on no value of a tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log it."""
        with explained_entries(batch, type(self).__name__):
            found = self._loss_function(batch)
        if isinstance(found, Loss):
            self.log_train_loss(found.mean, found.weight)
            return found.value
        self.log_train_loss(found)
        return found

    def before_compilation(self) -> None:
        """Do what `loss` does at its first call and cannot be compiled; it may be called several times."""

    def _loss_function(self, batch: Any) -> Tensor | Loss:
        if not self.compile_mode:
            return self.loss(batch)
        if self._compiled_loss is None:
            self._require_compiler()
            self._refuse_many_cuda_graphs(batch)
            self.before_compilation()
            self._compiled_loss = torch.compile(self.loss, **self._compile_options)
        for name, dimension in self.varying_sizes.items():
            if name in batch:
                private_names.make_size_a_variable(batch[name], dimension)
        return self._compiled_loss(batch)

    def _require_compiler(self) -> None:
        on_cpu = self.device.type == "cpu" and self.compile_backend == "inductor"
        if on_cpu and not private_names.finds_cpp_compiler():
            raise MisconfigurationException(
                "model.compile: torch.compile needs a C++ compiler for a CPU and finds none; install g++ or clang, or "
                "add --model.compile false"
            )

    @property
    def _makes_cuda_graphs(self) -> bool:
        return self.compile_mode in ("reduce-overhead", "max-autotune")

    def _refuse_many_cuda_graphs(self, batch: Any) -> None:
        """Refuse CUDA graphs if the sizes of batches vary; on a CPU too, so that what runs there also runs on a GPU."""
        varying = [name for name in self.varying_sizes if name in batch]
        if varying and self._makes_cuda_graphs:
            raise MisconfigurationException(
                f"model.compile: {self.compile_mode} records a CUDA graph for each size of a batch, and the sizes of "
                f"{', '.join(varying)} vary; set it to true"
            )

    @property
    def _compile_options(self) -> dict[str, Any]:
        """Arguments of `torch.compile`."""
        options: dict[str, Any] = {"backend": self.compile_backend, "dynamic": None if self.varying_sizes else False}
        return options if self.compile_mode is True else options | {"mode": self.compile_mode}

    def scale_learning_rates(self, shares: Mapping[str, float]) -> None:
        """Multiply the learning rates of parameters, by name; callbacks call it in `setup`, in any order."""
        for name, share in shares.items():
            self.scaled_rates[name] = self.scaled_rates.get(name, 1.0) * share

    def configure_optimizers(self) -> Any:
        """Return the optimiser over the weight-decay groups, and the schedule, which steps with the optimiser.

        Raises:
            MisconfigurationException: Without an optimiser, if it or the schedule refuses its arguments, or if the
                length of the run is unknown.
        """
        if self.optimizer_factory is None:
            raise MisconfigurationException("no optimizer: section; set one, or module.optimizer_factory")
        with refusals("optimizer", private_names.built_class(self.optimizer_factory)):
            own = self.learning_rate_shares
            shares = own | {name: share * own.get(name, 1.0) for name, share in self.scaled_rates.items()}
            optimizer = self.optimizer_factory(weight_decay_groups(self, shares))
        check_arguments(optimizer, self.device)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("lr_share", 1.0)
        if self.schedule_factory is None:
            return optimizer
        total_steps = self.trainer.estimated_stepping_batches  # the trainer checks its own arguments here
        with refusals("lr_scheduler", private_names.built_class(self.schedule_factory)):
            schedule = build_schedule(self.schedule_factory, optimizer, total_steps)
        config = {"scheduler": schedule, "interval": "step", "name": "lr"}
        if isinstance(schedule, ReduceLROnPlateau):  # stepped by `OptimizerSettings` after each validation
            config |= {"reduce_on_plateau": True, "monitor": "val/loss", "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule; some of PyTorch's refuse an argument here, such as a length of 0.

        Raises:
            MisconfigurationException: If it does.
        """
        with refusals("lr_scheduler", type(scheduler)):
            super().lr_scheduler_step(scheduler, metric)

    def configure_model(self) -> None:
        """Shard the weights over the processes if the strategy does."""
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            self.trainer.strategy.shard(self)

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callback of the optimiser and the schedule; it runs before the checkpoint of a validation.

        Whatever their order in the YAML, the callbacks that add parameters are set up before those that freeze some for
        the whole run, these before all others, which read or set what is trained, and the one that averages the weights
        is the last of all (their `setup_order`).
        """
        self.trainer.callbacks.sort(key=lambda callback: getattr(callback, "setup_order", 0))
        self.scaled_rates = {}  # without those of an earlier fit, since the callbacks multiply
        return [OptimizerSettings()]

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Remove the gradients of the last optimiser step.

        The backward pass of a CUDA graph writes its gradients to the same memory each time. So where gradients are
        accumulated, they need memory of their own, to which each backward pass adds. It is new in each step: gradients
        of a step without accumulation are in the memory of the graph, which the last forward pass has reused. A frozen
        parameter that the optimiser holds stays without a gradient, because one of zero would be decayed.
        """
        optimizer.zero_grad()
        if self._makes_cuda_graphs and self.trainer.accumulate_grad_batches > 1:
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
                parameter.grad = torch.zeros_like(parameter)

    def on_after_backward(self) -> None:
        """Make the gradient that of the mean loss of the optimiser step, before it is read, clipped or used.

        Lightning divides each loss by `accumulate_grad_batches`, but the last step of an epoch may have fewer batches.
        """
        trainer = self.trainer
        if private_names.is_accumulating(trainer):
            return
        private_names.unscale_gradients(trainer)
        n, n_whole = private_names.batches_of_step(trainer), trainer.accumulate_grad_batches
        if n < n_whole:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(n_whole / n)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient (`trainer.gradient_clip_val`), and log its norm before and after."""
        self._losses_of_step.clear()  # called once an optimiser step, after its last micro-batch
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        by_norm = gradient_clip_algorithm in (None, "norm")
        if self.logging_is_due or (gradient_clip_val and by_norm):
            norm = total_norm(gradients)
        if gradient_clip_val and by_norm:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        elif gradient_clip_val:
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        if self.logging_is_due:
            self.log("train/grad_norm", norm)
            if gradient_clip_val:
                self.log("train/grad_norm_clipped", total_norm(gradients))

    def log_train_loss(self, loss: Tensor, weight: Tensor | float = 1.0) -> None:
        """Log `train/loss` if logging is due: the mean over the micro-batches of the optimiser step and the ranks.

        Args:
            loss: Loss of one micro-batch, a scalar.
            weight: Weight of this micro-batch in the mean, such as its number of targets.
        """
        if self.logging_is_due:
            loss = loss.detach()
            self._losses_of_step.append(torch.stack([loss * weight, torch.ones_like(loss) * weight]))
            total, weights = self.trainer.strategy.reduce(torch.stack(self._losses_of_step).sum(0), reduce_op="sum")
            self.log("train/loss", total / weights)

    @property
    def logging_is_due(self) -> bool:
        """Whether the metrics of the optimiser step in progress are written (`trainer.log_every_n_steps`)."""
        every = self.trainer.log_every_n_steps
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; skip the look-up of `nn.Module` for one that Lightning sets many times a step."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any], **arguments: Any) -> Self:
        """Return the module that a checkpoint holds, for inference; it is not compiled.

        Args:
            checkpoint: Content of a checkpoint file.
            **arguments: Arguments of the constructor, in place of those in the checkpoint.
        """
        accepted = private_names.argument_names(cls)
        saved = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in accepted}
        module = cls(**saved | ({"compile": False} if "compile" in accepted else {}) | arguments)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **arguments: Any,
    ) -> Self:
        """Return the module of a checkpoint file, as `of_checkpoint`; nothing in the file is run.

        Args:
            checkpoint_path: Path of the file.
            map_location: Device of the module; `None` means the CPU.
            hparams_file: Not used: the checkpoint holds the arguments of the constructor.
            strict: Not used: all weights must fit.
            weights_only: Not used: only tensors and plain values are read.
            **arguments: Arguments of the constructor, in place of those in the checkpoint.
        """
        module = cls.of_checkpoint(AtomicCheckpointIO().load_model(checkpoint_path), **arguments)
        return module if map_location is None else module.to(map_location)

    def next_command(self, run: str) -> str:
        """Return the command that a user is likely to run after a run of this module."""
        return f"llm-train validate -c {run}/config.yaml --ckpt_path best"

    def closing_lines(self, best: Mapping[str, float]) -> list[str]:
        """Return lines to print at the end of a fit, beside that of the best loss.

        Args:
            best: Metrics of the best validation, `val/...`.
        """
        return []

    @property
    def _public_path(self) -> str:
        """Path of the class in YAML: that of its package if the package re-exports it, as those of topics do."""
        name, module = type(self).__qualname__, type(self).__module__
        package = module.rpartition(".")[0]
        re_exported = getattr(sys.modules.get(package), name, None) is type(self)
        return f"{package if re_exported else module}.{name}"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the class of the module, and its adapters, which are added before its weights are loaded."""
        checkpoint["module_class"] = self._public_path
        if settings := adapter_settings(self):
            checkpoint["adapters"] = settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint fits this module, and add the adapters that it holds.

        Raises:
            MisconfigurationException: If the checkpoint is of another class, its weights have other shapes, or its
                adapters another `alpha`, by which their output would be scaled.
        """
        saved_class = checkpoint.get("module_class", "an unknown module")
        if saved_class != self._public_path:
            raise MisconfigurationException(
                f"ckpt_path: the checkpoint is of {saved_class}, this run is of {self._public_path}"
            )
        adapters = checkpoint.get("adapters", {})
        if adapters and not adapted_layers(self):
            add_adapters(self, **adapters)
        own_adapters = adapter_settings(self)
        if adapters and own_adapters and own_adapters["alpha"] != adapters["alpha"]:
            raise MisconfigurationException(
                f"ckpt_path: the checkpoint does not fit the model: alpha of LoRA is {adapters['alpha']} in the "
                f"checkpoint and {own_adapters['alpha']} in the model; use the run's own config.yaml"
            )
        own, saved = self.state_dict(), checkpoint["state_dict"]
        for name in sorted(own.keys() | saved.keys()):
            own_shape, saved_shape = (tuple(s[name].shape) if name in s else "nothing" for s in (own, saved))
            if own_shape != saved_shape:
                raise MisconfigurationException(
                    f"ckpt_path: the checkpoint does not fit the model: {name} is {saved_shape} in the checkpoint and "
                    f"{own_shape} in the model; use the run's own config.yaml"
                )


class GradientFreeModule(ExperimentModule):
    """Base of modules whose training steps have no loss and no gradient, because they count or measure.

    Lightning counts the steps of an optimiser, and logs, saves and resumes by that count. This class therefore has an
    optimiser, over one unused parameter. A training step ends with `count_step`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.unused = nn.Parameter(torch.zeros(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser that counts steps; the `optimizer:` of the YAML is not used."""
        return torch.optim.SGD([self.unused], lr=0.0)

    def count_step(self) -> None:
        """Count an optimiser step."""
        self.optimizers().step()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint fits; the unused parameter had no dimension in earlier versions."""
        checkpoint["state_dict"]["unused"] = torch.zeros(1)
        super().on_load_checkpoint(checkpoint)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of several gradients together, over all processes if they are sharded."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
