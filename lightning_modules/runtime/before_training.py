"""What a network knows before it has learned anything."""

import math

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException


class LossBeforeTraining(L.Callback):
    """Validates before the first step, so that learning curves begin at step 0.

    Logs the validation's metrics there, and two that no later step overwrites: `init/loss`, and `init/excess_loss`,
    which is what the loss has above ln(vocab_size), that of a uniform guess. A network that is drawn at random can
    know no better; it can know worse, where its guesses are sure.

    Lightning's sanity check of the validation, whose results nobody sees, becomes this validation.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Makes the sanity check a whole validation; Lightning leaves it out where a run is resumed."""
        trainer.num_sanity_val_steps = math.inf

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hands the results to the loggers.

        Raises:
            MisconfigurationException: If the module's validation measures no loss, or it has no vocabulary.
        """
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "val/loss" not in metrics or "vocab_size" not in pl_module.hparams:
            raise MisconfigurationException(
                f"LossBeforeTraining: {type(pl_module).__name__} has no val/loss over a vocabulary; "
                "leave the callback out"
            )
        loss = metrics["val/loss"]
        metrics |= {"init/loss": loss, "init/excess_loss": loss - math.log(pl_module.hparams["vocab_size"])}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=None)  # no step is done
