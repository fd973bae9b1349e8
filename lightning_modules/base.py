"""What every module shares: the optimiser and schedule that YAML declares, the gradient norm, honest checkpoints."""

import inspect
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_modules.adapters import adapted_layers, add_adapters
from lightning_modules.optim import OptimizerFactory, ScheduleFactory, weight_decay_groups
from lightning_modules.sharded import FullyShardedStrategy


class ExperimentModule(L.LightningModule):
    """Base of the topics' modules.

    The command sets `optimizer_factory` and `schedule_factory` from the YAML's `optimizer:` and `lr_scheduler:`; who
    uses a module without the command sets them, or overrides `configure_optimizers`.
    """

    optimizer_factory: OptimizerFactory | None = None
    schedule_factory: ScheduleFactory | None = None

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate_shares: dict[str, float] = {}  # by parameter, 1 for others; callbacks set it in their setup
        self._losses_of_step: list[torch.Tensor] = []

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any]) -> Self:
        """A module as a checkpoint has it, to be used and not to be trained: it is not compiled.

        Args:
            checkpoint: Of a module of this class.
        """
        accepted = inspect.signature(cls).parameters
        arguments = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in accepted}
        module = cls(**arguments | ({"compile": False} if "compile" in accepted else {}))
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module

    def __setattr__(self, name: str, value: Any) -> None:
        """As in `nn.Module`, but at once for the name that Lightning sets forty times a step to follow its hooks."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def configure_optimizers(self) -> Any:
        """The optimiser over the decay groups, and the schedule, stepped per optimiser step.

        Raises:
            MisconfigurationException: Without an optimiser, or where the length of the run is unknown.
        """
        if self.optimizer_factory is None:
            raise MisconfigurationException("no optimizer: section; set one, or module.optimizer_factory")
        optimizer = self.optimizer_factory(weight_decay_groups(self, self.learning_rate_shares))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("lr_share", 1.0)
        if self.schedule_factory is None:
            return optimizer
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise MisconfigurationException(
                "lr_scheduler: the length of the run is unknown; set trainer.max_steps or trainer.max_epochs"
            )
        try:
            schedule = self.schedule_factory(optimizer, int(total_steps))
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def configure_model(self) -> None:
        """Shares out the weights among the processes, where that is the strategy."""
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            self.trainer.strategy.shard(self)

    def configure_callbacks(self) -> list[L.Callback]:
        """Shows the schedules what each validation found, before the checkpoint of that validation is written."""
        return [_ScheduleObserver()]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as `trainer.gradient_clip_val` says, and logs the norm that the gradient had before, and has after.

        Args:
            optimizer: The optimiser that is about to step.
            gradient_clip_val: Largest norm, or largest absolute value; `None` does not clip.
            gradient_clip_algorithm: `norm` (the default) or `value`.
        """
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

    def log_train_loss(self, loss: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        """Logs `train/loss` when logging is due: the mean over the micro-batches of the optimiser step and the ranks.

        Args:
            loss: Loss of one micro-batch, a scalar.
            weight: What the loss is a mean of, where shares of a batch differ in it: the number of targets, say.
        """
        if self.logging_is_due:
            loss = loss.detach()
            self._losses_of_step.append(torch.stack([loss * weight, torch.ones_like(loss) * weight]))
            total, weights = self.trainer.strategy.reduce(torch.stack(self._losses_of_step).sum(0), reduce_op="sum")
            self.log("train/loss", total / weights)

    @property
    def logging_is_due(self) -> bool:
        """Whether the optimiser step in progress is one whose metrics are written (`trainer.log_every_n_steps`)."""
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0

    def next_command(self, run: str) -> str:
        """What a user will want to do after a run of this module, as a command.

        Args:
            run: The run's folder.
        """
        return f"llm-train validate -c {run}/config.yaml --ckpt_path best"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes whose checkpoint it is."""
        checkpoint["module_class"] = f"{type(self).__module__}.{type(self).__qualname__}"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another topic or another size in one line, and makes room for its adapters.

        Raises:
            MisconfigurationException: If the checkpoint does not fit this module.
        """
        own_class = f"{type(self).__module__}.{type(self).__qualname__}"
        saved_class = checkpoint.get("module_class", "an unknown module")
        if saved_class != own_class:
            raise MisconfigurationException(
                f"ckpt_path: the checkpoint is of {saved_class}, this run is of {own_class}"
            )
        if "adapters" in checkpoint and not adapted_layers(self):
            add_adapters(self, **checkpoint["adapters"])
        own, saved = self.state_dict(), checkpoint["state_dict"]
        for name in sorted(own.keys() | saved.keys()):
            own_shape, saved_shape = (tuple(s[name].shape) if name in s else "nothing" for s in (own, saved))
            if own_shape != saved_shape:
                raise MisconfigurationException(
                    f"ckpt_path: the checkpoint does not fit the model: {name} is {saved_shape} in the checkpoint and "
                    f"{own_shape} in the model; give the run's own config.yaml"
                )


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Norm of gradients together, over all processes where they are shared out.

    Args:
        gradients: Tensors of any shapes.
    """
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _ScheduleObserver(L.Callback):
    """Hands validation metrics to the schedules that wait for them."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            for config in trainer.lr_scheduler_configs:
                if hasattr(config.scheduler, "observe"):
                    config.scheduler.observe(trainer.callback_metrics)
