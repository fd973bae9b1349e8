"""A figure of the topic, drawn from a file that the run writes."""

import csv
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_csv
from lightning_modules.runtime.drawing import DrawsAtTheEnd, draw_by_group
from lightning_modules.runtime.stages import validates_a_fit


class MajorityByMargin(DrawsAtTheEnd):
    """Writes `accuracy_by_margin.csv` after each validation, and draws it when the training ends.

    The margin of a sequence is the number of occurrences of its most frequent token minus that of the next one. The
    callback reads `module.predictions`, and `module.data.margins("val")`, a tensor (n,) of integers.
    """

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the accuracy of the latest validation by margin."""
        if not validates_a_fit(trainer) or trainer.fast_dev_run:
            return
        probabilities, labels, positions = pl_module.predictions
        correct = probabilities.argmax(1) == labels  # (n,)
        margins = pl_module.data.margins("val")[positions]  # (n,)
        rows = [(margin, f"{correct[margins == margin].float().mean():.4f}") for margin in margins.unique().tolist()]
        write_csv(Path(trainer.default_root_dir) / "accuracy_by_margin.csv", ["margin", "accuracy"], rows)

    def draw(self, run: Path) -> list[Path]:
        """Draw the accuracy by margin, if there was a validation.

        Args:
            run: Folder of the run.
        """
        table = run / "accuracy_by_margin.csv"
        if not table.is_file():
            return []
        with table.open(newline="") as file:
            accuracy = {row["margin"]: float(row["accuracy"]) for row in csv.DictReader(file)}
        figure = run / "figures" / "accuracy_by_margin.png"
        return [draw_by_group({"network": accuracy}, figure, xlabel="margin", ylabel="accuracy")]
