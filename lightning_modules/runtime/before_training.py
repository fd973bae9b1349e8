"""The loss of a network before it is trained."""

import math

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.runtime.drawing import log_before_training


class LossBeforeTraining(L.Callback):
    """Callback that validates before the first step, so that learning curves begin at step 0.

    It logs the metrics of that validation at step 0, and two more that no later step overwrites: `init/loss`, and
    `init/excess_loss`, the loss minus ln(vocab_size), which is the loss of a uniform guess. Before training the excess
    is about 0 at best, and larger if the predictions are confident. This validation replaces Lightning's sanity check.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Extend the sanity check to the whole validation split; Lightning skips it when a run is resumed."""
        trainer.num_sanity_val_steps = math.inf

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the results at step 0.

        Raises:
            MisconfigurationException: If the module logs no validation loss, or has no vocabulary.
        """
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "val/loss" not in metrics or "vocab_size" not in pl_module.hparams:
            raise MisconfigurationException(
                f"LossBeforeTraining: {type(pl_module).__name__} has no val/loss over a vocabulary; "
                "leave the callback out"
            )
        loss, uniform = metrics["val/loss"], math.log(pl_module.hparams["vocab_size"])
        log_before_training(trainer, metrics | {"init/loss": loss, "init/excess_loss": loss - uniform})
