"""Learning rates by layer."""

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.base import ExperimentModule
from lightning_modules.common.ranges import PositiveShare
from lightning_modules.finetuning.selection import ModelParts


class LayerwiseRates(L.Callback):
    """Callback that gives each layer a smaller learning rate than the next one (Howard and Ruder, 2018, section 3.2).

    The head learns at the optimiser's rate, the last layer at `decay` times that rate, the layer before it at `decay`
    squared times that rate, and so on down to the embeddings. The rates of `GradualUnfreezing` multiply these.

    Args:
        decay: Learning rate of a layer as a share of that of the next layer, in (0, 1].
    """

    def __init__(self, decay: PositiveShare = 0.9) -> None:
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: ExperimentModule, stage: str) -> None:
        """Set the rates before the optimiser is built.

        Raises:
            MisconfigurationException: If the model has no layers.
        """
        if stage != "fit":
            return
        parts = ModelParts(pl_module)
        if not parts.layers:
            raise MisconfigurationException(
                "LayerwiseRates: the model has no stack of layers; remove it from trainer.callbacks"
            )
        for depth, names in enumerate([*reversed(parts.layers), parts.embeddings], start=1):
            pl_module.scale_learning_rates(dict.fromkeys(names, self.decay**depth))
