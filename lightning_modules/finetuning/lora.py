"""Training of low-rank adapters in place of all weights."""

from fnmatch import fnmatchcase
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.finetuning.adapters import adapted_layers, add_adapters, linear_layers
from lightning_modules.finetuning.freeze import FreezingCallback
from lightning_modules.finetuning.selection import Anatomy, Selection, in_short


class LoRA(FreezingCallback):
    """Freezes the whole model and trains low-rank adapters beside its linear layers (Hu et al., 2021).

    A checkpoint holds the adapters beside the frozen weights; `model/` is exported with the adapters folded in, as a
    plain model.

    Args:
        rank: Rank of the adapters (at least 1).
        alpha: What the adapters add is multiplied by `alpha / rank`.
        dropout: Share of an adapter's input that is dropped in training (0 to 1).
        targets: Linear layers that get adapters, as glob patterns of their names; `null` takes all in the stack of
            layers.
        also_trained: Parameters that are trained beside the adapters, as glob patterns: a new head, `"classifier.*"`.
        keep_dropout: Whether frozen modules drop units out in training as the others do.

    Raises:
        MisconfigurationException: If a size is outside its range.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: list[str] | None = None,
        also_trained: list[str] | None = None,
        keep_dropout: bool = False,
    ) -> None:
        super().__init__(keep_dropout)
        if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
            raise MisconfigurationException(
                f"LoRA: rank must be at least 1, alpha more than 0, dropout in [0, 1); got {rank}, {alpha}, {dropout}"
            )
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.targets = targets
        self.also_trained = also_trained

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Adds the adapters before a checkpoint is loaded and the optimiser is made.

        Raises:
            MisconfigurationException: If a pattern names nothing that is there.
        """
        if adapted_layers(pl_module):
            return
        self.adapters = {
            "targets": self._targets(pl_module),
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
        }
        also_trained = self.chosen(Selection(patterns=self.also_trained), pl_module) if self.also_trained else {}
        add_adapters(pl_module, **self.adapters)
        for parameter in also_trained.values():
            parameter.requires_grad = True

    def _targets(self, pl_module: L.LightningModule) -> list[str]:
        layers = linear_layers(pl_module)
        patterns = self.targets or [f"{Anatomy(pl_module).stack}.*"]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise MisconfigurationException(
                    f"LoRA: no linear layer is named {pattern!r}; there are {in_short(layers)}"
                )
        return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes what adapters there are, so that who loads the checkpoint can add them first."""
        checkpoint["adapters"] = self.adapters
