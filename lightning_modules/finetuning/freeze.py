"""Freezing of parameters, for the whole run or until an epoch.

A frozen parameter has `requires_grad=False`: it gets no gradient, no optimiser state and no weight decay. Autograd
records nothing before the first trained parameter, which saves the time and the memory of that part of the backward
pass.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_modules.base import ExperimentModule
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeFloat, NonNegativeInt
from lightning_modules.finetuning.selection import ModelParts, Selection
from lightning_modules.runtime import private_names
from lightning_modules.runtime.sharded import require_whole_weights


class FreezingCallback(L.Callback):
    """Base of the callbacks that freeze parameters.

    Frozen modules run in evaluation mode. The numbers of trained and frozen parameters are printed when the training
    starts, by the last of these callbacks, and logged as `model/trained_parameters` and `model/frozen_parameters`.

    Args:
        keep_dropout: Whether dropout stays active in frozen modules.
    """

    def __init__(self, keep_dropout: bool = False) -> None:
        self.keep_dropout = keep_dropout
        self._frozen_modules: list[nn.Module] = []
        self._counts = (0, 0)

    @contextmanager
    def selecting(self) -> Iterator[None]:
        """Raise the `ValueError` of a selection as a `MisconfigurationException` that names the callback."""
        try:
            yield
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def update(self, pl_module: L.LightningModule) -> None:
        """Count the trained and the frozen parameters, and find the frozen modules.

        Raises:
            MisconfigurationException: If all parameters are frozen.
        """
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        if not trained:
            raise MisconfigurationException(f"{type(self).__name__}: everything is frozen; leave something to train")
        self._counts = trained, sum(p.numel() for p in pl_module.parameters()) - trained
        for module in self._frozen_modules:
            module.training = True  # the next batch undoes this for modules that are still frozen
        self._frozen_modules = [] if self.keep_dropout else frozen_modules(pl_module)

    def say_counts(self, trainer: L.Trainer, when: str = "") -> None:
        """Print the numbers of trained and frozen parameters in a line after `when`, if no such callback follows."""
        if self is [callback for callback in trainer.callbacks if isinstance(callback, FreezingCallback)][-1]:
            trained, frozen = self._counts
            share = trained / (trained + frozen)
            say(f"{when}{trained:,} parameters are trained ({share:.1%}), {frozen:,} are frozen")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what this callback and others have frozen, and print the numbers."""
        self.update(pl_module)
        self.say_counts(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: ExperimentModule, *_: object) -> None:
        """Put frozen modules into evaluation mode, since other code may have called `train()` on the model."""
        for module in self._frozen_modules:
            if module.training:  # reading is faster than setting an attribute of a module
                module.training = False
        if pl_module.logging_is_due:
            trained, frozen = self._counts
            pl_module.log_dict({"model/trained_parameters": float(trained), "model/frozen_parameters": float(frozen)})


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters are all frozen, and all modules inside them.

    If all parameters before the layers are frozen, the modules without parameters before the layers are included, such
    as the dropout of the embeddings.
    """

    def is_frozen(parameters: Iterable[nn.Parameter]) -> bool:
        requires_grad = [p.requires_grad for p in parameters]
        return bool(requires_grad) and not any(requires_grad)

    found: dict[nn.Module, None] = {}
    for module in model.modules():
        if is_frozen(module.parameters()):
            found |= dict.fromkeys(module.modules())
    parts = ModelParts(model)
    if is_frozen(parts.embeddings.values()):
        parent, _, name = parts.stack.rpartition(".")
        siblings = model.get_submodule(parent).named_children()
        before = (module for _, module in takewhile(lambda sibling: sibling[0] != name, siblings))
        found |= dict.fromkeys(module for module in before if not list(module.parameters()))
    return list(found)


class Freeze(FreezingCallback):
    """Callback that freezes parameters for the whole run, those of adapters included (see `LoRA`).

    Args:
        embeddings: Whether to freeze the parameters before the first layer; see `Selection` for this and the others.
        layers: Layers to freeze: `3`, `-1`, `":6"`, `"2:-1"`, `":50%"` for the first half.
        patterns: Parameters to freeze by name, as glob patterns: `"*.mlp.*"`, `"*bias"`.
        all_but_head: Whether to freeze all parameters except those after the last layer.
    """

    setup_order = -1  # before the callbacks that read what is frozen; see `ExperimentModule.configure_callbacks`

    def __init__(
        self,
        keep_dropout: bool = False,
        embeddings: bool = False,
        layers: int | str | None = None,
        patterns: list[str] | None = None,
        all_but_head: bool = False,
    ) -> None:
        super().__init__(keep_dropout)
        self.selection = Selection(embeddings, layers, patterns, all_but_head)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Freeze the parameters before the optimiser is built, so that it does not hold them.

        Raises:
            MisconfigurationException: If a range or a pattern matches nothing, or nothing is left to train.
        """
        if stage == "fit":
            with self.selecting():
                frozen = self.selection.of(pl_module)
            for parameter in frozen.values():
                parameter.requires_grad = False
            self.update(pl_module)


@dataclass
class Stage(Selection):
    """Parameters that are unfrozen together.

    Args:
        epoch: First epoch in which they are trained, counted from 0.
        rate: Their learning rate as a share of the optimiser's, or of that of `LayerwiseRates`; 0 or more.
    """

    epoch: NonNegativeInt = 0
    rate: NonNegativeFloat = 1.0


class GradualUnfreezing(FreezingCallback):
    """Callback that unfreezes a model in stages with separate learning rates (Howard and Ruder, 2018, section 3.3).

    Parameters that no stage selects are trained from the start at the optimiser's rate; a parameter that several stages
    select belongs to the earliest. The optimiser holds all parameters from the start, and skips those without a
    gradient: they get neither state nor weight decay. The epoch alone decides what is frozen, so a resumed run
    gives the same weights.

    Args:
        stages: Which parameters are unfrozen, when, and at what rate.

    Raises:
        MisconfigurationException: If there is no stage.
    """

    def __init__(self, stages: list[Stage], keep_dropout: bool = False) -> None:
        super().__init__(keep_dropout)
        if not stages:
            raise MisconfigurationException("GradualUnfreezing: stages is empty; give at least one stage")
        self.stages = sorted(stages, key=lambda stage: stage.epoch)
        self._first_epochs: dict[nn.Parameter, int] = {}
        self._epoch = -1

    def setup(self, trainer: L.Trainer, pl_module: ExperimentModule, stage: str) -> None:
        """Set the learning rates of the stages. Nothing is frozen yet: the optimiser and DDP need all parameters.

        Raises:
            MisconfigurationException: If a stage selects nothing, if DDP would wait for the gradients of frozen
                parameters, or if the weights are sharded.
        """
        if stage != "fit":
            return
        require_whole_weights(trainer, type(self).__name__)
        if not private_names.takes_unused_parameters(trainer):
            raise MisconfigurationException(
                "GradualUnfreezing: set trainer.strategy to ddp_find_unused_parameters_true, or the processes would "
                "wait for the gradients of frozen parameters"
            )
        rates: dict[str, float] = {}
        for part in reversed(self.stages):  # so that the earliest stage overrides the later ones
            with self.selecting():
                selected = part.of(pl_module)
            for name, parameter in selected.items():
                self._first_epochs[parameter] = part.epoch
                rates[name] = part.rate
        pl_module.scale_learning_rates(rates)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freeze the later stages, now that the optimiser is built; keep what another callback froze frozen."""
        self._first_epochs = {p: epoch for p, epoch in self._first_epochs.items() if p.requires_grad}
        self._unfreeze(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Unfreeze at the first batch of an epoch; no other hook runs if a run is resumed within the epoch."""
        if trainer.current_epoch != self._epoch:
            self._unfreeze(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Unfreeze what the stages have left frozen, or another fit of the module would never train it."""
        for parameter in self._first_epochs:
            parameter.requires_grad = True
        for module in self._frozen_modules:
            module.training = True
        self._first_epochs, self._frozen_modules = {}, []

    def _unfreeze(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before, self._epoch = self._counts, trainer.current_epoch
        for parameter, first_epoch in self._first_epochs.items():
            parameter.requires_grad = self._epoch >= first_epoch
        self.update(pl_module)
        if self._counts != before:
            self.say_counts(trainer, f"epoch {self._epoch}: ")
