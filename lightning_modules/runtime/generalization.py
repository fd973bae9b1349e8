"""The gap between the loss on held-out text and the loss on training text."""

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_modules.base import ExperimentModule
from lightning_modules.common import run_files
from lightning_modules.common.figures import new_figure, save_figure
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.runtime.drawing import DrawsAtTheEnd
from lightning_modules.runtime.learning_curve import read_metrics
from lightning_modules.runtime.sharded import evaluating


class GeneralizationGap(DrawsAtTheEnd):
    """Callback that logs how much higher the loss is on the validation text than on the training text.

    `val/train_text_loss` is the loss on a fixed part of the training text, computed as `val/loss` is; `val/gap` is
    `val/loss` minus `val/train_text_loss`. `train/loss` cannot replace it, because it is computed with dropout, on one
    batch. When the training ends, the callback draws `figures/generalization_gap.png`.

    It works with every `ExperimentModule` whose `evaluation_results` have a `loss`. Of `pl_module.data` it reads
    `train_dataloader()`, whose dataset must have a method `covering_starts(most)` as `datamodules.windows.TokenWindows`
    has, and `evaluation_loader(dataset, starts)`.

    Args:
        n_windows: Number of windows of the training text, spread evenly over it (1 or more); all windows if there are
            fewer.

    Raises:
        MisconfigurationException: If the module computes no validation loss, or the data has no running text.
    """

    def __init__(self, n_windows: PositiveInt = 128) -> None:
        self.n_windows = n_windows
        self._loader: DataLoader | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Choose the windows, so that data without running text is refused before the first step."""
        self._loader = self._training_text(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: ExperimentModule) -> None:
        """Evaluate the windows of the training text, and log their loss and the gap."""
        if self._loader is None:
            self._loader = self._training_text(pl_module)
        metrics = pl_module.val_metrics
        validation = {} if metrics is None else pl_module.evaluation_results(metrics, "val")
        if metrics is None or "loss" not in validation:
            raise MisconfigurationException(
                f"GeneralizationGap: {type(pl_module).__name__} computes no validation loss; remove the callback"
            )
        metrics = metrics.clone()
        metrics.reset()
        for batch in self._loader:
            with evaluating(trainer):
                pl_module.evaluation_step(trainer.strategy.batch_to_device(batch), metrics)
        loss = pl_module.evaluation_results(metrics, "val")["loss"]
        pl_module.log_dict({"val/train_text_loss": loss, "val/gap": validation["loss"] - loss}, sync_dist=True)

    def _training_text(self, pl_module: ExperimentModule) -> DataLoader:
        text = pl_module.data.train_dataloader().dataset
        if not hasattr(text, "covering_starts"):
            raise MisconfigurationException(
                f"GeneralizationGap: {type(pl_module.data).__name__} has no running text; remove the callback"
            )
        return pl_module.data.evaluation_loader(text, text.covering_starts(self.n_windows))

    def draw(self, run: Path) -> list[Path]:
        """Draw both losses against the optimiser step, with the gap between them shaded."""
        steps, (seen, unseen) = read_metrics(run / run_files.METRICS, "val/train_text_loss", "val/loss")
        if not steps:
            return []
        figure = new_figure(7, 4)
        axes = figure.add_subplot()
        axes.plot(steps, unseen, color="tab:orange", marker="o", markersize=4, label="validation text")
        axes.plot(steps, seen, color="tab:blue", marker="o", markersize=4, label="training text, no dropout")
        axes.fill_between(steps, seen, unseen, color="tab:gray", alpha=0.15, label="gap")
        axes.set(xlabel="optimiser step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
        return [save_figure(figure, run / "figures" / "generalization_gap.png")]
