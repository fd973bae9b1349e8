"""Learning rates by layer."""

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.finetuning.selection import Anatomy


class LayerwiseRates(L.Callback):
    """Gives each layer a smaller learning rate than the one above it (Howard and Ruder, 2018, section 3.2).

    The head learns at the optimiser's rate, the last layer at `decay` times it, the one below at `decay` squared, and
    so on down to the embeddings.

    Args:
        decay: Learning rate of a layer, as a share of that of the layer above it (more than 0, to 1).

    Raises:
        MisconfigurationException: If the decay is outside its range.
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 < decay <= 1:
            raise MisconfigurationException(f"LayerwiseRates: decay must be in (0, 1], got {decay}")
        self.decay = decay

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Sets the rates before the optimiser is made."""
        anatomy = Anatomy(pl_module)
        for depth, names in enumerate([*reversed(anatomy.layers), anatomy.embeddings], start=1):
            pl_module.learning_rate_shares |= dict.fromkeys(names, self.decay**depth)
