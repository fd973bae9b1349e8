"""The number of steps that a run needs to a given loss."""

from typing import Any

import lightning as L

from lightning_modules.runtime.stages import validates_a_fit


class StepsToLoss(L.Callback):
    """Callback that logs `steps_to_loss`, the step at which the validation loss fell to a target.

    The step is interpolated between the last validation above the target and the first one that reaches it. It is
    logged once; a run that never reaches the target logs nothing.

    Args:
        target: Loss to reach.
        monitor: Metric of the validation.
    """

    def __init__(self, target: float, monitor: str = "val/loss") -> None:
        self.target = target
        self.monitor = monitor
        self.reached = False
        self._before: tuple[int, float] | None = None  # step and loss of the last validation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the loss of the validation with the target."""
        if not validates_a_fit(trainer) or self.reached or self.monitor not in trainer.callback_metrics:
            return
        step, loss = trainer.global_step, float(trainer.callback_metrics[self.monitor])
        if loss <= self.target:
            self.reached = True
            earlier, above = self._before or (step, loss)
            share = (above - self.target) / (above - loss) if above > loss else 1.0
            for logger in trainer.loggers:
                logger.log_metrics({"steps_to_loss": earlier + share * (step - earlier)}, step=step - 1)
        self._before = step, loss

    def state_dict(self) -> dict[str, Any]:
        """Return the last validation, whether the target was reached, and what both are about."""
        return {"reached": self.reached, "before": self._before, "target": self.target, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last validation, unless this run has another target or metric; older checkpoints hold neither."""
        mine = {"target": self.target, "monitor": self.monitor}
        if all(state_dict.get(name, value) == value for name, value in mine.items()):
            self.reached, self._before = state_dict["reached"], state_dict["before"]
