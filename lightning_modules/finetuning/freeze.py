"""Which parameters of a model are trained: some frozen, some thawed later, or small adapters in place of all of them.

The callbacks know nothing of a model but what PyTorch says: its parameters by name, and its layers, the largest
`nn.ModuleList` in it. What a model registers before its layers are its embeddings, what comes after them its head. A
matrix that both share, as the tied embeddings of GPT-2, counts as embedding.

A frozen parameter has `requires_grad=False`: it gets no gradient, no optimiser state and no weight decay. What lies
between the input and the first trained parameter leaves no graph behind, so neither backward pass nor memory for it.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from lightning_modules.finetuning.adapters import adapted_layers, add_adapters, linear_layers
from lightning_modules.runtime import private_names
from lightning_modules.runtime.sharded import require_whole_weights

Parameters = dict[str, nn.Parameter]


class Anatomy:
    """A model's parameters, each under its first name, by where they stand.

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: Parameters = dict(model.named_parameters())
        stacks = {name: stack for name, stack in model.named_modules() if isinstance(stack, nn.ModuleList)}
        # The one with most in it: attention may have lists of its own.
        self.stack = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()), default="")
        n_layer = len(stacks[self.stack]) if stacks else 0
        self.layers: list[Parameters] = [self._under(f"{self.stack}.{i}.") for i in range(n_layer)]
        names = list(self.parameters)
        in_layers = [i for i, name in enumerate(names) if any(name in layer for layer in self.layers)] or [0]
        self.embeddings = {name: self.parameters[name] for name in names[: in_layers[0]]}
        self.head = {name: self.parameters[name] for name in names[in_layers[-1] + 1 :]}

    def _under(self, prefix: str) -> Parameters:
        return {name: parameter for name, parameter in self.parameters.items() if name.startswith(prefix)}

    def matching(self, pattern: str) -> Parameters:
        """The parameters whose name a glob pattern matches; `*` stands for dots too.

        Raises:
            ValueError: If there are none, with the names there are.
        """
        found = {name: p for name, p in self.parameters.items() if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"no parameter is named {pattern!r}; there are {_in_short(self.parameters)}")
        return found

    def layer_range(self, text: int | str) -> Parameters:
        """The parameters of some layers: `3`, `-1`, `:6`, `2:-1`, `:50%`, counted as Python does.

        Raises:
            ValueError: If it is no range, or no layer is in it, with the layers there are.
        """
        n = len(self.layers)
        if not n:
            raise ValueError(f"layers {text}: the model has no stack of layers; name them by patterns")
        bounds = [_bound(part, n) for part in str(text).split(":")]
        if "bad" in bounds or len(bounds) > 2:
            raise ValueError(
                f"layers {text!r} is no range: write one layer (3, or -1 for the last), or where to begin and to stop "
                "(':6', '2:-1', ':50%')"
            )
        chosen = range(n)[slice(*bounds)] if len(bounds) == 2 else [i for i in range(n) if i == bounds[0] % n]
        if not chosen or (len(bounds) == 1 and not -n <= bounds[0] < n):
            raise ValueError(
                f"layers {text!r}: there is no such layer; there are {n}, {self.stack}.0 to {self.stack}.{n - 1}"
            )
        return {name: p for i in chosen for name, p in self.layers[i].items()}


def _in_short(names: Iterable[str]) -> str:
    """Names with a star for the number of the layer, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def _bound(text: str, n: int) -> int | str | None:
    text = text.strip()
    if not text:
        return None
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        return round(n * float(share[1]) / 100)
    return int(text) if re.fullmatch(r"-?\d+", text) else "bad"


@dataclass
class Selection:
    """Parameters of a model: all that one of these names.

    Args:
        embeddings: Whether what stands before the first layer is meant.
        layers: Which layers are meant, counted as in Python: `3`, `-1`, `":6"`, `"2:-1"`, `":50%"` for the first half.
        patterns: Which parameters are meant by name, as glob patterns: `"*.mlp.*"`, `"*bias"`.
        all_but_head: Whether everything is meant but what stands after the last layer.
    """

    embeddings: bool = False
    layers: int | str | None = None
    patterns: list[str] | None = None
    all_but_head: bool = False

    def of(self, model: nn.Module) -> Parameters:
        """The parameters that are meant, in the model's order.

        Raises:
            ValueError: If a range or a pattern names nothing that is there, or nothing is named.
        """
        anatomy = Anatomy(model)
        chosen: Parameters = {}
        if self.embeddings:
            chosen |= anatomy.embeddings
        if self.layers is not None:
            chosen |= anatomy.layer_range(self.layers)
        for pattern in self.patterns or []:
            chosen |= anatomy.matching(pattern)
        if self.all_but_head:
            chosen |= {name: p for name, p in anatomy.parameters.items() if name not in anatomy.head}
        if not chosen:
            raise ValueError("nothing is named; set embeddings, layers, patterns or all_but_head")
        return {name: p for name, p in anatomy.parameters.items() if name in chosen}


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
                    f"LoRA: no linear layer is named {pattern!r}; there are {_in_short(layers)}"
                )
        return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes what adapters there are, so that who loads the checkpoint can add them first."""
        checkpoint["adapters"] = self.adapters
