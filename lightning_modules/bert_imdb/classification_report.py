"""A report on a classifier: its predictions as a table, two figures, and its most confident mistakes."""

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.classification import BINS, ClassifierModule
from lightning_modules.common.figures import new_figure, save_figure
from lightning_modules.common.files import write_csv
from lightning_modules.common.ranges import NonNegativeInt
from lightning_modules.runtime.drawing import DrawsAtTheEnd, show_table
from lightning_modules.runtime.stages import validates_a_fit

if TYPE_CHECKING:  # matplotlib is imported where it is used: it is slow to import
    from matplotlib.figure import Figure

_MISTAKE = ("place", "label", "predicted", "probability", "text")


class ClassificationReport(DrawsAtTheEnd):
    """Callback that writes the predictions and mistakes of the best validation and of a test, and draws two figures.

    `predictions_val.csv` holds the probabilities of the classes. `figures/confusion_val.png` and
    `figures/reliability_val.png` are drawn from it. `wrong_val.csv` holds the examples that the model classifies
    wrongly, those with the highest probability first; W&B shows them as the table `val/most_confidently_wrong`.

    The module has `predictions`, see `ClassifierModule`. The datamodule has `classes`, and its `texts[split]` is the
    list of the reviews of a split, by position.

    Args:
        n_wrong: Largest number of examples in `wrong_val.csv`.
    """

    def __init__(self, n_wrong: NonNegativeInt = 20) -> None:
        self.n_wrong = n_wrong
        self.best_loss = math.inf

    def on_validation_end(self, trainer: L.Trainer, pl_module: ClassifierModule) -> None:
        """Write both tables if the validation loss is the lowest so far."""
        loss = float(trainer.callback_metrics["val/loss"])
        if validates_a_fit(trainer) and loss < self.best_loss:
            self.best_loss = loss
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: ClassifierModule) -> None:
        """Write both tables and draw the figures."""
        self._write(trainer, pl_module, "test")
        self.on_train_end(trainer, pl_module)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, pl_module: ClassifierModule, split: str) -> None:
        if trainer.fast_dev_run:
            return
        run, classes, reviews = Path(trainer.default_root_dir), pl_module.data.classes, pl_module.data.texts[split]
        probabilities, labels, positions = (part.numpy() for part in pl_module.predictions)
        predictions = (
            [position, classes[label], *map("{:.8g}".format, row)]
            for position, label, row in zip(positions, labels, probabilities.tolist(), strict=True)
        )
        write_csv(run / f"predictions_{split}.csv", ["position", "label", *classes], predictions)
        mistakes = []
        for i in most_confidently_wrong(probabilities, labels)[: self.n_wrong]:
            review, predicted = reviews[positions[i]], int(probabilities[i].argmax())
            probability = round(float(probabilities[i, predicted]), 4)
            mistakes.append([review.place, classes[labels[i]], classes[predicted], probability, review.text])
        write_csv(run / f"wrong_{split}.csv", _MISTAKE, mistakes)
        show_table(trainer, f"{split}/most_confidently_wrong", _MISTAKE, mistakes)

    def draw(self, run: Path) -> list[Path]:
        """Draw both figures of each split that has predictions, and return their files."""
        figures = []
        for split in ("val", "test"):
            file = run / f"predictions_{split}.csv"
            if file.is_file():
                predictions = read_predictions(file)
                for name, figure_of in (("confusion", _confusion_figure), ("reliability", _reliability_figure)):
                    figures.append(save_figure(figure_of(*predictions), run / "figures" / f"{name}_{split}.png"))
        return figures

    def state_dict(self) -> dict[str, float]:
        """Return the lowest validation loss so far."""
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the lowest validation loss."""
        self.best_loss = state_dict["best_loss"]


def most_confidently_wrong(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the indices of the wrongly classified examples, the most confident first: (n, K) and (n,) to (wrong,)."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")]


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the number of examples, the mean confidence and the accuracy in each bin of confidence, each (bins,)."""
    confidence, is_right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return counts, np.bincount(bins, confidence, BINS) / counts, np.bincount(bins, is_right, BINS) / counts


def read_predictions(predictions: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the names of the classes, the labels (n,) and the probabilities (n, K) of a file `predictions_*.csv`."""
    with predictions.open(newline="") as file:
        (_, _, *classes), *rows = csv.reader(file)
    labels = np.array([classes.index(label) for _, label, *_ in rows])
    return classes, labels, np.array([row[2:] for row in rows], dtype=float)


def _confusion_figure(classes: list[str], labels: np.ndarray, probabilities: np.ndarray) -> "Figure":
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels, probabilities.argmax(1)), 1)
    figure = new_figure(1.6 + len(classes), 1.2 + len(classes))
    axes = figure.add_subplot()
    axes.imshow(counts, cmap="Blues", vmin=0)
    for (i, j), count in np.ndenumerate(counts):
        axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if count > counts.max() / 2 else "black")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="label")
    return figure


def _reliability_figure(classes: list[str], labels: np.ndarray, probabilities: np.ndarray) -> "Figure":
    counts, confidence, accuracy = reliability(labels, probabilities)
    figure = new_figure(5, 4.5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    centres = (np.arange(BINS) + 0.5) / BINS
    above.bar(centres, np.nan_to_num(accuracy), width=0.9 / BINS, color="tab:blue", alpha=0.7)
    above.plot(confidence, confidence, color="black", marker=".", linewidth=1, label="perfectly calibrated")
    above.set_ylabel("accuracy")
    above.legend()
    below.bar(centres, counts, width=0.9 / BINS, color="tab:gray")
    below.set(xlabel="probability of the predicted class", ylabel="examples", xlim=(1 / len(classes), 1))
    return figure
