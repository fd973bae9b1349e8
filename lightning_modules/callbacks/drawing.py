"""What callbacks that draw have in common."""

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.loggers import MetricsCSV

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DrawsAtTheEnd(L.Callback):
    """Base of callbacks that draw figures from what the run has saved, when the training ends, however it ends."""

    def draw(self, run: Path) -> list[Path]:
        """Draws what there is to draw.

        Args:
            run: The run's folder.

        Returns:
            The figures.
        """
        raise NotImplementedError

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws, and shows the figures to the loggers that take pictures."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        for figure in self.draw(Path(trainer.default_root_dir)):
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(f"figures/{figure.stem}", [str(figure)])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Draws what there is."""
        if trainer.global_step:
            self.on_train_end(trainer, pl_module)


def save_figure(picture: "Figure", figure: Path) -> None:
    """Writes a picture under a temporary name, which then takes the place of an older one.

    Args:
        picture: What to write.
        figure: PNG file to make or replace.
    """
    figure.parent.mkdir(parents=True, exist_ok=True)
    temporary = figure.with_name(f".{figure.name}")
    picture.savefig(temporary, dpi=120)
    temporary.replace(figure)
