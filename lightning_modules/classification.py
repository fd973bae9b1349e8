"""How good the probabilities of a classifier are, measured over a whole set of examples."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, functional
from torchmetrics.utilities import dim_zero_cat

BINS = 15  # of the calibration error, as in Guo et al. (2017)


class ClassificationMeasures(Metric):
    """Loss, accuracy, F1, AUROC and calibration error of all examples seen, on all processes.

    What was predicted for each example stays at hand, so that others can tell which ones were wrong.

    Args:
        n_classes: Number of classes, at least 2.
        **kwargs: As for `Metric`.
    """

    full_state_update = False

    def __init__(self, n_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_classes = n_classes
        for name in ("logits", "labels", "positions"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, positions: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: Scores of the classes, (B, K).
            labels: The right ones, (B,).
            positions: Numbers of the examples, (B,).
        """
        self.logits.append(logits.float())
        self.labels.append(labels)
        self.positions.append(positions)

    def compute(self) -> dict[str, Tensor]:
        """The measures by name.

        `loss` is in nats an example. `f1` and `auroc` are means over the classes. `calibration_error` is the mean
        distance of confidence and accuracy in 15 equal bins of confidence, weighted by their examples (Guo et al.,
        2017, https://arxiv.org/abs/1706.04599).
        """
        logits, labels, _ = self._in_order()
        probabilities = logits.softmax(-1)
        options = {"num_classes": self.n_classes, "validate_args": False}
        return {
            "loss": F.cross_entropy(logits, labels),
            "accuracy": (probabilities.argmax(1) == labels).float().mean(),
            "f1": functional.classification.multiclass_f1_score(probabilities, labels, **options),
            "auroc": functional.classification.multiclass_auroc(probabilities, labels, **options),
            "calibration_error": functional.classification.multiclass_calibration_error(
                probabilities, labels, n_bins=BINS, **options
            ),
        }

    def predictions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities (n, K), labels (n,) and positions (n,), in the order of the positions."""
        logits, labels, positions = self._in_order()
        return logits.softmax(-1), labels, positions

    def _in_order(self) -> tuple[Tensor, Tensor, Tensor]:
        logits, labels, positions = (dim_zero_cat(part) for part in (self.logits, self.labels, self.positions))
        order = positions.argsort()
        return logits[order], labels[order], positions[order]
