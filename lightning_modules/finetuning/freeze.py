"""Freezing of parameters, for the whole run or until an epoch.

A frozen parameter has `requires_grad=False`: it gets no gradient, no optimiser state and no weight decay. What lies
between the input and the first trained parameter leaves no graph behind, so neither backward pass nor memory for it.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from lightning_modules.finetuning.selection import Anatomy, Parameters, Selection
from lightning_modules.runtime import private_names
from lightning_modules.runtime.sharded import require_whole_weights


class FreezingCallback(L.Callback):
    """What the callbacks share: frozen modules run as in evaluation, and the run says how much is trained.

    Args:
        keep_dropout: Whether frozen modules drop units out in training as the others do.
    """

    def __init__(self, keep_dropout: bool = False) -> None:
        self.keep_dropout = keep_dropout
        self._frozen_modules: list[nn.Module] = []
        self._counts = (0, 0)

    def chosen(self, selection: Selection, pl_module: L.LightningModule) -> Parameters:
        """The parameters that a selection means.

        Raises:
            MisconfigurationException: If a range or a pattern names nothing that is there, or nothing is named.
        """
        try:
            return selection.of(pl_module)
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error

    def take_stock(self, pl_module: L.LightningModule) -> None:
        """Finds out what is frozen now.

        Raises:
            MisconfigurationException: If everything is.
        """
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        if not trained:
            raise MisconfigurationException(f"{type(self).__name__}: everything is frozen; leave something to train")
        self._counts = trained, sum(p.numel() for p in pl_module.parameters()) - trained
        for module in self._frozen_modules:
            module.training = True  # unless it still is frozen: the next batch sees to it
        self._frozen_modules = [] if self.keep_dropout else frozen_modules(pl_module)

    @rank_zero_only
    def say(self, when: str = "") -> None:
        """Tells the user how much is trained."""
        trained, frozen = self._counts
        share = trained / (trained + frozen)
        print(f"{when}{trained:,} parameters are trained ({share:.1%}), {frozen:,} are frozen", file=sys.stderr)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out what is frozen, by this callback and by others, and says so."""
        self.take_stock(pl_module)
        self.say()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Takes frozen modules back to evaluation, whoever has called `train()` on the model meanwhile."""
        for module in self._frozen_modules:
            if module.training:
                module.training = False
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            trained, frozen = self._counts
            pl_module.log_dict({"model/trained_parameters": float(trained), "model/frozen_parameters": float(frozen)})


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are all frozen, with all that is in them.

    Where everything before the layers is frozen, this takes in what has no parameters there: the dropout of embeddings.

    Args:
        model: Any module.
    """

    def is_frozen(parameters: Iterable[nn.Parameter]) -> bool:
        requires_grad = [p.requires_grad for p in parameters]
        return bool(requires_grad) and not any(requires_grad)

    found: dict[nn.Module, None] = {}
    for module in model.modules():
        if is_frozen(module.parameters()):
            found |= dict.fromkeys(module.modules())
    anatomy = Anatomy(model)
    if is_frozen(anatomy.embeddings.values()):
        parent, _, name = anatomy.stack.rpartition(".")
        for sibling, module in model.get_submodule(parent).named_children():
            if sibling == name:
                break
            if not list(module.parameters()):
                found[module] = None
    return list(found)


class Freeze(FreezingCallback):
    """Freezes parameters for the whole run.

    Args:
        embeddings: Whether what stands before the first layer is frozen. A matrix that the output shares with the
            embeddings is frozen with them.
        layers: Layers to freeze, counted as in Python: `3`, `-1`, `":6"`, `"2:-1"`, `":50%"` for the first half.
        patterns: Parameters to freeze by name, as glob patterns: `"*.mlp.*"`, `"*bias"`.
        all_but_head: Whether everything is frozen but what stands after the last layer.
        keep_dropout: Whether frozen modules drop units out in training as the others do.
    """

    def __init__(
        self,
        embeddings: bool = False,
        layers: int | str | None = None,
        patterns: list[str] | None = None,
        all_but_head: bool = False,
        keep_dropout: bool = False,
    ) -> None:
        super().__init__(keep_dropout)
        self.selection = Selection(embeddings, layers, patterns, all_but_head)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Freezes before the optimiser is made, so that it never sees what is frozen.

        Raises:
            MisconfigurationException: If a range or a pattern names nothing that is there, or nothing is left to train.
        """
        if stage == "fit":
            for parameter in self.chosen(self.selection, pl_module).values():
                parameter.requires_grad = False
            self.take_stock(pl_module)


@dataclass
class Stage(Selection):
    """Parameters that are thawed together.

    Args:
        epoch: Epoch from whose beginning on they are trained, counted from 0.
        rate: Their learning rate, as a share of the optimiser's (0 or more).
    """

    epoch: int = 0
    rate: float = 1.0


class GradualUnfreezing(FreezingCallback):
    """Thaws a model in stages (Howard and Ruder, 2018, ULMFiT, section 3.3), each with a learning rate of its own.

    Parameters that no stage names are trained from the start at the optimiser's rate; a parameter that several stages
    name belongs to the earliest. All of them are in the optimiser from the start, which leaves out what has no gradient
    yet: without state, without weight decay. What is frozen follows from the epoch alone, so a resumed run is exact.

    Args:
        stages: What is thawed when, and how fast it learns.
        keep_dropout: Whether frozen modules drop units out in training as the others do.

    Raises:
        MisconfigurationException: If there is no stage, or one has a negative epoch or rate.
    """

    def __init__(self, stages: list[Stage], keep_dropout: bool = False) -> None:
        super().__init__(keep_dropout)
        for stage in stages:
            if stage.epoch < 0 or stage.rate < 0:
                raise MisconfigurationException(f"GradualUnfreezing: epoch and rate must not be negative, got {stage}")
        if not stages:
            raise MisconfigurationException("GradualUnfreezing: stages is empty; name what is thawed when")
        self.stages = sorted(stages, key=lambda stage: stage.epoch)
        self._thawed_at: dict[nn.Parameter, int] = {}
        self._epoch = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the stages their rates. Nothing is frozen yet: the optimiser and DDP are to see all of it.

        Raises:
            MisconfigurationException: If a stage names nothing that is there, if DDP would wait for frozen parameters,
                or if the weights are shared out, which puts others in their places.
        """
        if stage != "fit":
            return
        require_whole_weights(trainer, type(self).__name__)
        if not private_names.takes_unused_parameters(trainer):
            raise MisconfigurationException(
                "GradualUnfreezing: set trainer.strategy to ddp_find_unused_parameters_true, or the processes would "
                "wait for the gradients of what is frozen"
            )
        thawed_at: dict[str, int] = {}
        for part in self.stages:
            for name in self.chosen(part, pl_module):
                if name not in thawed_at:
                    thawed_at[name] = part.epoch
                    pl_module.learning_rate_shares[name] = part.rate
        self._thawed_at = {pl_module.get_parameter(name): epoch for name, epoch in thawed_at.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freezes what is to wait, now that the optimiser is made; what another callback froze stays frozen."""
        self._thawed_at = {p: epoch for p, epoch in self._thawed_at.items() if p.requires_grad}
        self._thaw(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Thaws at the first batch of an epoch: a run that is resumed in mid-epoch has no other beginning of it."""
        if trainer.current_epoch != self._epoch:
            self._thaw(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module)

    def _thaw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before, self._epoch = self._counts, trainer.current_epoch
        for parameter, epoch in self._thawed_at.items():
            parameter.requires_grad = self._epoch >= epoch
        self.take_stock(pl_module)
        if self._counts != before:
            self.say(f"epoch {self._epoch}: ")
