"""Base of the classifiers: a metric of the probabilities of the classes, and the training and evaluation steps."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error, multiclass_f1_score
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.base import CompileMode, ExperimentModule
from lightning_modules.metrics import SplitMetric

Batch = dict[str, Tensor]

BINS = 15  # of the calibration error, as in Guo et al. (2017)


class ClassificationMeasures(SplitMetric):
    """Loss, accuracy, F1, AUROC and calibration error over a split, on all processes.

    It keeps the scores of every example of the split, so that `predictions` can return them.

    Args:
        n_classes: Number of classes K, at least 2.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    logits: list[Tensor]
    labels: list[Tensor]
    positions: list[Tensor]

    def __init__(self, n_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_classes = n_classes
        for name in ("logits", "labels", "positions"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, positions: Tensor) -> None:
        """Add a batch: scores (B, K), labels (B,) and positions in the split (B,)."""
        self.logits.append(logits.float())
        self.labels.append(labels)
        self.positions.append(positions)

    def compute(self) -> dict[str, Tensor]:
        """Return `loss`, `accuracy`, `f1`, `auroc` and `calibration_error`.

        `loss` is in nats an example. `f1` and `auroc` are means over the classes: `auroc` over those of the split,
        and 0 if it has only one. `calibration_error` is the mean difference between confidence and accuracy over `BINS`
        equal bins of confidence, weighted by their examples (Guo et al., 2017, https://arxiv.org/abs/1706.04599).
        """
        logits, labels, _ = self._in_order()
        probabilities = logits.softmax(-1)
        options: dict[str, Any] = {"num_classes": self.n_classes, "validate_args": False}
        return {
            "loss": F.cross_entropy(logits, labels),
            "accuracy": (probabilities.argmax(1) == labels).float().mean(),
            "f1": multiclass_f1_score(probabilities, labels, **options),
            "auroc": _auroc(probabilities, labels),
            "calibration_error": multiclass_calibration_error(probabilities, labels, n_bins=BINS, **options),
        }

    def predictions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probabilities (n, K), labels (n,) and positions (n,), ordered by position."""
        logits, labels, positions = self._in_order()
        return logits.softmax(-1), labels, positions

    def _in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        logits, labels, positions = (dim_zero_cat(part) for part in (self.logits, self.labels, self.positions))
        order = positions.argsort()
        return logits[order], labels[order], positions[order]


def _auroc(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean AUROC of the classes, each against the others; that of torchmetrics has 0 for an absent class."""
    present = labels.unique().tolist()
    if len(present) < 2:
        return torch.zeros((), device=labels.device)
    columns = ((probabilities[:, label], (labels == label).long()) for label in present)
    return torch.stack([binary_auroc(*column, validate_args=False) for column in columns]).mean()


class ClassifierModule(ExperimentModule):
    """Base of modules that assign one of K classes to each example.

    A subclass builds its network and implements `forward(batch)`, which returns scores of the classes, (B, K). This
    class trains them with cross entropy, and logs the results of `ClassificationMeasures`.

    A batch is a dictionary. This class reads two of its entries: `labels`, the correct classes, (B,) int64; and
    `positions`, the positions of the examples in their split, (B,) int64. The others are for `forward`.

    Args:
        n_classes: Number of classes K, at least 2.
    """

    # Of the latest evaluation, for callbacks: probabilities (n, K), labels (n,) and positions (n,), by position.
    predictions: tuple[Tensor, ...]

    def __init__(self, n_classes: int, compile: CompileMode = False) -> None:
        super().__init__(compile)
        self.n_classes = n_classes
        self.track(ClassificationMeasures(n_classes))

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross entropy of a batch in nats, a scalar."""
        return F.cross_entropy(self(batch).float(), batch["labels"])

    def evaluation_step(self, batch: Batch, metrics: ClassificationMeasures) -> None:
        """Update the metrics with a batch, which may be empty."""
        metrics.update(self._scores(batch), batch["labels"], batch["positions"])

    def evaluation_results(self, metrics: ClassificationMeasures, split: str) -> Mapping[str, Tensor]:
        """Return the results of a split by name, and keep the predictions of all processes."""
        with metrics.sync_context():
            self.predictions = tuple(part.cpu() for part in metrics.predictions())
        return metrics.compute()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return `probabilities` of the classes, (B, K), and `positions` of the examples, (B,)."""
        return {"probabilities": self._scores(batch).softmax(-1), "positions": batch["positions"]}

    def closing_lines(self, best: Mapping[str, float]) -> list[str]:
        """Return the accuracy of the model and of baselines, and what to change if the model is worse than one of them.

        A baseline is also the constant answer: the most frequent class of the validation split.
        """
        by_length = sorted(best.items(), key=lambda item: len(item[0]))
        found = {name: value for name, value in by_length if name.endswith("/accuracy")}
        constant = float("nan")  # not known
        if "val/accuracy" in found and hasattr(self, "predictions") and len(labels := self.predictions[1]):
            constant = labels.bincount().max().item() / len(labels)
            found["always the most frequent class"] = constant
        if not found:
            return []
        lines = [", ".join(f"{name} {value:.4f}" for name, value in found.items())]
        ours = found.get("val/accuracy", 1.0)
        if ours <= constant + 1e-6:
            lines.append("it may need more steps, such as --trainer.max_epochs 40, or a higher --optimizer.lr")
        elif ours < max(found.values()):
            lines.append("a baseline is better: pretrained models need an --optimizer.lr of 1e-5 to 1e-4, others more")
        return lines

    def _scores(self, batch: Batch) -> Tensor:
        """Return the scores of a batch, (B, K), or none if this process has no share of it.

        On several processes, some have no share of the last batch of an evaluation, and most models of Transformers
        fail on a batch without rows.
        """
        if not len(batch["positions"]):
            return torch.zeros(0, self.n_classes, device=batch["positions"].device)
        return self(batch).float()
