"""Learned, or learned by heart? Two measures beside the validation loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.decoder_pretrain.signal_propagation import check_decoder
from lightning_modules.metrics import CorpusLoss
from lightning_modules.models.decoder import Decoder
from lightning_modules.runtime.drawing import DrawsAtTheEnd, save_figure
from lightning_modules.runtime.learning_curve import read_metric

Batch = dict[str, Tensor]

_STRIDE = 1_000_003  # a prime, so that seed and number of a batch hardly ever fall on the same


class GeneralizationGap(DrawsAtTheEnd):
    """Logs how much better a network predicts the text it has seen than text it has not.

    `val/train_text_loss` is the loss on a fixed part of the training text, measured as that of the validation text is;
    `val/gap` is the validation loss less that. `train/loss` would mislead: it is taken with units dropped out, from
    one batch. Draws `figures/generalization_gap.png`.

    Args:
        n_windows: Windows of the training text, spread evenly over it (at least 1); all of them where it has fewer.

    Raises:
        MisconfigurationException: If `n_windows` is less than 1, or the module or the data has no text.
    """

    def __init__(self, n_windows: int = 128) -> None:
        if n_windows < 1:
            raise MisconfigurationException(f"GeneralizationGap: n_windows must be at least 1, got {n_windows}")
        self.n_windows = n_windows
        self._loader: DataLoader | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks whether there is a loss to compare with."""
        _check_measures(pl_module, type(self).__name__)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the training text, and logs it beside the validation text, which has just been measured."""
        if self._loader is None:
            self._loader = self._training_text(pl_module)
        measures = CorpusLoss().to(pl_module.device)
        for batch in self._loader:
            measure(trainer, pl_module, measures, trainer.strategy.batch_to_device(batch))
        loss = measures.compute()["loss"]
        gap = pl_module.val_measures.compute()["loss"] - loss
        pl_module.log_dict({"val/train_text_loss": loss, "val/gap": gap}, sync_dist=True)

    def _training_text(self, pl_module: L.LightningModule) -> DataLoader:
        text = pl_module.data.train_dataloader().dataset
        if not hasattr(text, "covering_starts"):
            raise MisconfigurationException(
                f"GeneralizationGap: {type(pl_module.data).__name__} has no running text; leave the callback out"
            )
        starts = text.covering_starts()
        spread = torch.linspace(0, len(starts) - 1, min(self.n_windows, len(starts))).long()
        return pl_module.data.evaluation_loader(text, starts[spread])

    def draw(self, run: Path) -> list[Path]:
        """Draws both losses against the step, and the gap between them.

        Args:
            run: The run's folder.
        """
        (steps, seen), (_, unseen) = (
            read_metric(run / "metrics.csv", name) for name in ("val/train_text_loss", "val/loss")
        )
        if not steps:
            return []
        from matplotlib.figure import Figure  # no pyplot: no global state, no window system

        picture = Figure(figsize=(7, 4), layout="constrained")
        axes = picture.add_subplot()
        axes.plot(steps, unseen, color="tab:orange", marker="o", markersize=4, label="validation text")
        axes.plot(steps, seen, color="tab:blue", marker="o", markersize=4, label="training text, no dropout")
        axes.fill_between(steps, seen, unseen, color="tab:gray", alpha=0.15, label="gap")
        axes.set(xlabel="optimiser step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
        figure = run / "figures" / "generalization_gap.png"
        save_figure(picture, figure)
        return [figure]


class AblatedLoss(DrawsAtTheEnd):
    """Logs what it costs to switch off a random share of the hidden units, such as `val/loss_ablated_25` for a quarter.

    Dropout is meant to keep units from relying on the presence of particular others (Hinton et al., 2012,
    https://arxiv.org/abs/1207.0580; Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html). Where
    what a network knows is spread over many units, it can do without some; networks that have learned by heart rely
    more on single ones (Morcos et al., 2018, https://arxiv.org/abs/1803.06959).

    Units are those inside the feed-forward networks, which a decoder's own dropout leaves alone: to be robust against
    the noise of the training would be no news. The same units are off at all positions of a batch, and the others are
    scaled by 1 / (1 - share), as in dropout, so that the layer loses units and not strength. The choice depends on the
    seed and the number of the batch alone, so every run, and every validation, is asked the same; a larger share holds
    the units of a smaller one.

    `val/ablation_cost_25` is the loss less that of the whole network. Draws `figures/ablation.png`. Under `test` the
    names begin with `test/`.

    Args:
        shares: Shares of the hidden units of each block to switch off (each 0 to less than 1).
        seed: Seed of the choice of units.

    Raises:
        MisconfigurationException: If there is no share, or one outside its range, or the module has no decoder.
    """

    def __init__(self, shares: list[float], seed: int = 0) -> None:
        if not shares or not all(0 <= share < 1 for share in shares):
            raise MisconfigurationException(f"AblatedLoss: shares must be numbers from 0 to less than 1, got {shares}")
        self.shares = sorted(shares)
        self.seed = seed
        self._measures: dict[float, CorpusLoss] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks whether there is a decoder to look into."""
        check_decoder(pl_module, type(self).__name__)
        _check_measures(pl_module, type(self).__name__)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew."""
        self._measures = {share: CorpusLoss().to(pl_module.device) for share in self.shares}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: object
    ) -> None:
        """Reads the batch again, with units switched off."""
        for share, measures in self._measures.items():
            with units_switched_off(pl_module.decoder, share, self.seed, batch_idx):
                measure(trainer, pl_module, measures, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the losses."""
        self._log("val", pl_module, pl_module.val_measures)

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the losses."""
        self._log("test", pl_module, pl_module.test_measures)

    def _log(self, split: str, pl_module: L.LightningModule, of_whole: CorpusLoss) -> None:
        whole = of_whole.compute()["loss"]
        for share, measures in self._measures.items():
            loss = measures.compute()["loss"]
            found = {_name(split, share): loss, f"{split}/ablation_cost_{100 * share:g}": loss - whole}
            pl_module.log_dict(found, sync_dist=True)

    def draw(self, run: Path) -> list[Path]:
        """Draws the loss against the share switched off, at the best validation and at the last.

        Args:
            run: The run's folder.
        """
        shares = sorted({0.0, *self.shares})
        names = [_name("val", share) if share else "val/loss" for share in shares]
        columns = [dict(zip(*read_metric(run / "metrics.csv", name), strict=True)) for name in names]
        steps = [step for step in columns[0] if all(step in column for column in columns)]
        if not steps:
            return []
        from matplotlib.figure import Figure

        picture = Figure(figsize=(7, 4), layout="constrained")
        axes = picture.add_subplot()
        for step in sorted({min(steps, key=columns[0].__getitem__), steps[-1]}):
            losses = [column[step] for column in columns]
            axes.plot([100 * share for share in shares], losses, marker="o", markersize=4, label=f"step {step}")
        axes.set(xlabel="hidden units switched off, %", ylabel="loss of the validation text")
        axes.grid(alpha=0.3)
        axes.legend()
        figure = run / "figures" / "ablation.png"
        save_figure(picture, figure)
        return [figure]


@contextmanager
def units_switched_off(decoder: Decoder, share: float, seed: int, number: int) -> Iterator[None]:
    """Sets a share of the hidden units of each block to 0, and scales the others up, while it lasts.

    Args:
        decoder: Is as before afterwards.
        share: Of the units of each block (0 to less than 1).
        seed: Seed of the choice of units.
        number: Of the choice: another one draws other units.
    """
    draws = torch.Generator().manual_seed(seed * _STRIDE + number)
    hooks = []
    for block in decoder.blocks:
        n_units = block.feed_forward.expansion.out_features
        factors = torch.full((n_units,), 1 / (1 - share))
        factors[torch.randperm(n_units, generator=draws)[: round(share * n_units)]] = 0
        factors = factors.to(block.feed_forward.expansion.weight)  # its type and device
        hooks.append(block.feed_forward.activation.register_forward_hook(partial(_scale, factors)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scale(factors: Tensor, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return output * factors  # (B, T, 4C) * (4C,)


def measure(trainer: L.Trainer, pl_module: L.LightningModule, measures: CorpusLoss, batch: Batch) -> None:
    """Adds a batch to the measures, in the precision of the run.

    Args:
        trainer: The trainer.
        pl_module: A module that gives logits for `input_ids`.
        measures: What to add to.
        batch: On the module's device.
    """
    with trainer.precision_plugin.forward_context():
        measures.update(pl_module(batch["input_ids"]), batch["targets"], batch["target_bytes"])


def _check_measures(pl_module: L.LightningModule, callback: str) -> None:
    if not isinstance(getattr(pl_module, "val_measures", None), CorpusLoss):
        raise MisconfigurationException(
            f"{callback}: {type(pl_module).__name__} measures no loss of a text; leave the callback out"
        )


def _name(split: str, share: float) -> str:
    return f"{split}/loss_ablated_{100 * share:g}"
