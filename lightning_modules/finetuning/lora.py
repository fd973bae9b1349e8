"""Training of low-rank adapters in place of all weights."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.common.messages import listed, say
from lightning_modules.common.ranges import PositiveFloat, PositiveInt, Probability
from lightning_modules.finetuning.adapters import adapted_layers, add_adapters, plain_parameters
from lightning_modules.finetuning.bases import is_new
from lightning_modules.finetuning.freeze import FreezingCallback
from lightning_modules.finetuning.selection import ModelParts, matching, of_all_layers
from lightning_modules.models.linear_layers import linear_layers


class LoRA(FreezingCallback):
    """Callback that freezes the model and trains low-rank adapters of its linear layers (Hu et al., 2021).

    Parameters that the base does not have are trained as well, and so is a new head, also where it begins with the
    weights of the base's pooler (see `bases.mark_as_new`).

    A checkpoint holds the frozen weights and the adapters; `model/` is exported as a plain model, with the adapters
    merged into its weights. A model that has adapters, because it was loaded or trained before, keeps them.

    `Freeze`, `GradualUnfreezing` and `LayerwiseRates` apply to the adapters of the layers that they select, before or
    after this callback in the list.

    Args:
        rank: Rank of the adapters, at least 1.
        alpha: The output of an adapter is multiplied by `alpha / rank`; more than 0.
        dropout: Probability that an input of an adapter is dropped in training, in [0, 1).
        targets: Linear layers that get adapters, as glob patterns of their names; `null` adapts all linear layers in
            the stack of layers.
        also_trained: Other parameters of the base to train, as glob patterns, such as `"*norm*"`.
    """

    setup_order = -2  # before the callbacks that select parameters; see `ExperimentModule.configure_callbacks`

    def __init__(
        self,
        rank: PositiveInt = 8,
        alpha: PositiveFloat = 16.0,
        dropout: Probability = 0.0,
        targets: list[str] | None = None,
        also_trained: list[str] | None = None,
        keep_dropout: bool = False,
    ) -> None:
        super().__init__(keep_dropout)
        self.sizes: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout}
        self.targets = targets
        self.also_trained = also_trained

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Add the adapters before a checkpoint is loaded and the optimiser is built.

        Raises:
            MisconfigurationException: If a pattern matches nothing.
        """
        parameters, layers = plain_parameters(pl_module), linear_layers(pl_module)
        patterns = self.targets or [f"{ModelParts(pl_module).stack}.*"]
        with self.selecting():
            also_trained = {
                name for pattern in self.also_trained or () for name in matching(parameters, pattern, "parameter")
            }
            if not adapted_layers(pl_module):
                chosen = {name for pattern in patterns for name in matching(layers, pattern, "linear layer")}
                add_adapters(pl_module, [name for name in layers if name in chosen], **self.sizes)
        for name, parameter in parameters.items():
            parameter.requires_grad = name in also_trained or is_new(parameter)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the numbers of trained and frozen parameters, and the names of the trained ones that are new."""
        super().on_train_start(trainer, pl_module)
        if new := [name for name, p in plain_parameters(pl_module).items() if is_new(p) and p.requires_grad]:
            say(f"LoRA trains new parameters too: {listed(of_all_layers(new))}")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that trains no adapter.

        Raises:
            MisconfigurationException: If another callback has frozen all adapters.
        """
        if not any(parameter.requires_grad for name, parameter in pl_module.named_parameters() if ".lora_" in name):
            raise MisconfigurationException(
                "LoRA: another callback freezes all adapters; remove Freeze from trainer.callbacks, because LoRA "
                "freezes the model itself, or remove LoRA"
            )
