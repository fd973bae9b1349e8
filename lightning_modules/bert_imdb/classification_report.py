"""What a classifier gets right and wrong: its predictions as a table, two figures, and its surest mistakes."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.classification import BINS
from lightning_modules.common.files import write_text
from lightning_modules.runtime.drawing import DrawsAtTheEnd, save_figure
from lightning_modules.runtime.stages import validates_a_fit

_WRONG = ("place", "label", "predicted", "probability", "text")


class ClassificationReport(DrawsAtTheEnd):
    """Writes `predictions_val.csv` and `wrong_val.csv` at the best validation, and the same for a test.

    From the first it draws `figures/confusion_val.png` and `figures/reliability_val.png`. The second has the examples
    that were wrong with the greatest probability; W&B shows them as the table `val/most_confidently_wrong`.

    Args:
        n_wrong: Examples in the second, at most (at least 0).
    """

    def __init__(self, n_wrong: int = 20) -> None:
        self.n_wrong = n_wrong
        self.best_loss = math.inf

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes what was predicted, if the loss was never lower."""
        loss = float(trainer.callback_metrics["val/loss"])
        if validates_a_fit(trainer) and loss < self.best_loss:
            self.best_loss = loss
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes what was predicted, and draws."""
        self._write(trainer, pl_module, "test")
        self.on_train_end(trainer, pl_module)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, side: str) -> None:
        if trainer.fast_dev_run:
            return
        folder, classes = Path(trainer.default_root_dir), pl_module.data.classes
        probabilities, labels, positions = (part.numpy() for part in pl_module.predictions)
        columns = ["position", "label", *classes]
        rows = zip(positions.tolist(), labels.tolist(), probabilities.tolist(), strict=True)
        _write_csv(
            folder / f"predictions_{side}.csv", columns, [[i, classes[k], *map("{:.8g}".format, p)] for i, k, p in rows]
        )
        texts = pl_module.data.texts[side]
        wrong = []
        for i in most_confidently_wrong(probabilities, labels)[: self.n_wrong]:
            review, predicted = texts[positions[i]], int(probabilities[i].argmax())
            probability = round(float(probabilities[i, predicted]), 4)
            wrong.append([review.place, classes[labels[i]], classes[predicted], probability, review.text])
        _write_csv(folder / f"wrong_{side}.csv", _WRONG, wrong)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(f"{side}/most_confidently_wrong", columns=list(_WRONG), data=wrong)

    def draw(self, run: Path) -> list[Path]:
        """Draws both figures of each side that was measured."""
        figures = []
        for side in ("val", "test"):
            predictions = run / f"predictions_{side}.csv"
            if predictions.is_file():
                classes, labels, probabilities = read_predictions(predictions)
                for name, draw in (("confusion", _draw_confusion), ("reliability", _draw_reliability)):
                    figures.append(run / "figures" / f"{name}_{side}.png")
                    draw(classes, labels, probabilities, figures[-1])
        return figures

    def state_dict(self) -> dict[str, float]:
        """The lowest loss so far."""
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Goes on comparing with it."""
        self.best_loss = state_dict["best_loss"]


def most_confidently_wrong(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The examples that were classified wrongly, the surest first.

    Args:
        probabilities: Of the classes, (n, K).
        labels: The right ones, (n,).
    """
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")]


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often predictions of each confidence are right: number, mean confidence and accuracy of each bin, (bins,).

    Args:
        labels: The right classes, (n,).
        probabilities: Of the classes, (n, K).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return counts, *(np.bincount(bins, values, BINS) / counts for values in (confidence, right))


def read_predictions(predictions: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Reads what `ClassificationReport` has written: names of the classes, labels (n,) and probabilities (n, K).

    Args:
        predictions: A file `predictions_*.csv`.
    """
    with predictions.open(newline="") as file:
        reader = csv.reader(file)
        _, _, *classes = next(reader)
        rows = [(classes.index(label), [float(p) for p in given]) for _, label, *given in reader]
    return classes, np.array([label for label, _ in rows]), np.array([given for _, given in rows])


def _write_csv(target: Path, columns: Any, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(target, text.getvalue())


def _draw_confusion(classes: list[str], labels: np.ndarray, probabilities: np.ndarray, figure: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no window system

    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (labels, probabilities.argmax(1)), 1)
    picture = Figure(figsize=(1.6 + len(classes), 1.2 + len(classes)), layout="constrained")
    axes = picture.add_subplot()
    axes.imshow(counts, cmap="Blues", vmin=0)
    for (i, j), count in np.ndenumerate(counts):
        axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if count > counts.max() / 2 else "black")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    save_figure(picture, figure)


def _draw_reliability(classes: list[str], labels: np.ndarray, probabilities: np.ndarray, figure: Path) -> None:
    from matplotlib.figure import Figure

    counts, confidence, accuracy = reliability(labels, probabilities)
    picture = Figure(figsize=(5, 4.5), layout="constrained")
    above, below = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    centres = (np.arange(BINS) + 0.5) / BINS
    above.bar(centres, np.nan_to_num(accuracy), width=0.9 / BINS, color="tab:blue", alpha=0.7)
    above.plot(confidence, confidence, color="black", marker=".", linewidth=1, label="as sure as right")
    above.set_ylabel("accuracy")
    above.legend()
    below.bar(centres, counts, width=0.9 / BINS, color="tab:gray")
    below.set_ylabel("examples")
    below.set_xlabel("probability of the predicted class")
    below.set_xlim(1 / len(classes), 1)
    save_figure(picture, figure)
