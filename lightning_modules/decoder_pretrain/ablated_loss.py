"""The loss of a decoder with a random share of its hidden units switched off."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.common import run_files
from lightning_modules.common.figures import new_figure, save_figure
from lightning_modules.common.ranges import Probability
from lightning_modules.decoder_pretrain.signal_propagation import require_decoder
from lightning_modules.metrics import CorpusLoss
from lightning_modules.models.decoder import Decoder
from lightning_modules.runtime.drawing import DrawsAtTheEnd
from lightning_modules.runtime.learning_curve import read_metrics
from lightning_modules.runtime.sharded import evaluating

if TYPE_CHECKING:
    from lightning_modules.decoder_pretrain.module import PretrainModule

_STRIDE = 1_000_003  # a prime far above the number of batches, so that different seeds draw different units


class AblatedLoss(DrawsAtTheEnd):
    """Callback that logs the loss with a share of the hidden units switched off, such as `val/loss_ablated_25`.

    Dropout keeps units from relying on the presence of particular other units (Hinton et al., 2012,
    https://arxiv.org/abs/1207.0580; Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a.html). A network
    that spreads its computation over many units loses little without some of them; a network that has memorised its
    text relies more on single units (Morcos et al., 2018, https://arxiv.org/abs/1803.06959).

    The units are those inside the feed-forward networks. The decoder's own dropout never drops them, so the callback
    does not merely repeat the noise of the training. The same units are off at all positions of a batch, and the
    others are scaled by 1 / (1 - share) as in dropout, so that the layer loses units and keeps its magnitude. The
    choice of units depends only on the seed and the number of the batch, so runs and validations are comparable. The
    units of a larger share include those of a smaller one.

    `val/ablation_cost_25` is `val/loss_ablated_25` minus `val/loss`. Under `test` the names begin with `test/`. When
    the training ends, the callback draws `figures/ablation.png`.

    Args:
        shares: Shares of the hidden units of each block to switch off (each 0 to less than 1).
        seed: Seed of the choice of units.

    Raises:
        MisconfigurationException: If `shares` is empty, or the module has no decoder or a compiled one.
    """

    def __init__(self, shares: list[Probability], seed: int = 0) -> None:
        if not shares:
            raise MisconfigurationException("AblatedLoss: shares is empty; give shares from 0 to less than 1")
        self.shares = sorted(shares)
        self.seed = seed
        self._metrics: dict[float, CorpusLoss] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the module has a decoder whose layers can be hooked."""
        require_decoder(pl_module, type(self).__name__)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create an empty metric for each share."""
        self._metrics = {share: CorpusLoss().to(pl_module.device) for share in self.shares}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: "PretrainModule",
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        *_: object,
    ) -> None:
        """Evaluate the batch again for each share, with that share of the units switched off."""
        for share, metrics in self._metrics.items():
            with units_switched_off(pl_module.decoder, share, self.seed, batch_idx), evaluating(trainer):
                pl_module.evaluation_step(batch, metrics)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: "PretrainModule") -> None:
        """Log the loss of each share, and the difference from `val/loss`."""
        self._log("val", pl_module, pl_module.val_metrics)

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: "PretrainModule") -> None:
        """Log the loss of each share, and the difference from `test/loss`."""
        self._log("test", pl_module, pl_module.test_metrics)

    def _log(self, split: str, pl_module: "PretrainModule", whole: Any) -> None:
        whole_loss = whole.compute()["loss"]
        for share, metrics in self._metrics.items():
            loss = metrics.compute()["loss"]
            results = {_name(split, share): loss, f"{split}/ablation_cost_{100 * share:g}": loss - whole_loss}
            pl_module.log_dict(results, sync_dist=True)

    def draw(self, run: Path) -> list[Path]:
        """Draw the loss against the share, at the best validation and at the last one."""
        shares = sorted({0.0, *self.shares})
        names = [_name("val", share) if share else "val/loss" for share in shares]
        steps, columns = read_metrics(run / run_files.METRICS, *names)
        if not steps:
            return []
        figure = new_figure(7, 4)
        axes = figure.add_subplot()
        for i in sorted({columns[0].index(min(columns[0])), len(steps) - 1}):
            losses = [column[i] for column in columns]
            axes.plot([100 * share for share in shares], losses, marker="o", markersize=4, label=f"step {steps[i]}")
        axes.set(xlabel="hidden units switched off, %", ylabel="loss of the validation text")
        axes.grid(alpha=0.3)
        axes.legend()
        return [save_figure(figure, run / "figures" / "ablation.png")]


@contextmanager
def units_switched_off(decoder: Decoder, share: float, seed: int, number: int) -> Iterator[None]:
    """Set a share of the hidden units of each block to 0 and scale the others up, within the context.

    Args:
        decoder: Any decoder; it is unchanged after the context.
        share: Share of the units of each block (0 to less than 1).
        seed: Seed of the choice of units.
        number: Number of the choice, such as the index of a batch; different numbers draw different units.
    """
    generator = torch.Generator().manual_seed(seed * _STRIDE + number)
    hooks = []
    for block in decoder.blocks:
        n_units = block.feed_forward.projection.in_features
        factors = torch.full((n_units,), 1 / (1 - share))
        factors[torch.randperm(n_units, generator=generator)[: round(share * n_units)]] = 0
        hooks.append(block.feed_forward.activation.register_forward_hook(partial(_scale, factors)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scale(factors: Tensor, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    # Not on the device of the weights: a sharded block can keep them in the memory of the host.
    return (output * factors.to(output.device)).to(output.dtype)  # (B, T, hidden) * (hidden,)


def _name(split: str, share: float) -> str:
    return f"{split}/loss_ablated_{100 * share:g}"
