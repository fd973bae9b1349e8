"""The experiments of Wang and Chen, "What Do Position Embeddings Learn?" (2020), https://arxiv.org/abs/2010.04903."""

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.base import GradientFreeModule
from lightning_modules.common.ranges import PositiveFloat, TwoOrMore
from lightning_modules.runtime.private_names import KeepsBufferDtypes


class WangChenModule(KeepsBufferDtypes, GradientFreeModule):
    """The two experiments of Wang and Chen (2020), section 3, on a position matrix and its controls.

    - Absolute position: a linear regression predicts the position of a row. Its predictions are rounded to whole
      positions; the mean absolute error is over folds of the rows in random order.
    - Order: a logistic regression predicts from the rows of a pair, concatenated, which comes first. The error rate is
      over folds of random pairs. A batch holds the pairs of one repetition, 512 in the paper.

    Each training step is one repetition with other pairs and other folds. The regressions are fitted completely within
    the step, so only the errors are kept. Rows are not standardised. There is no validation and no test. A run has one
    process.

    The module reads `cases`, `rows`, `labels` and `matrix` of the data; see `PositionProbeDataModule`.

    Args:
        n_folds: Folds of the cross-validation.
        penalty: Strength of the L2 penalty of the logistic regression; the paper uses 1, the default of scikit-learn.
    """

    settings_of_next = ("data.source", "data.n_embd")
    # Lightning skips the validation of a module that does not override these hooks.
    validation_step = L.LightningModule.validation_step
    test_step = L.LightningModule.test_step

    def __init__(self, n_folds: TwoOrMore = 5, penalty: PositiveFloat = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def next_command(self, run: str) -> str:
        """Return the command that probes the matrix with whole blocks of positions held out."""
        matrix = self.data.matrix
        size = "" if matrix.model else f" --data.n_positions {len(matrix.rows)}"  # a computed matrix needs it
        return f"llm-train fit -c position_probe/full{size}"

    def on_fit_start(self) -> None:
        """Refuse several processes, each of which would fit its regressions to a share of the pairs.

        Raises:
            MisconfigurationException: If there are several processes.
        """
        if self.trainer.world_size > 1:
            raise MisconfigurationException(
                f"trainer.devices: this run has {self.trainer.world_size} processes, but a regression is fitted to all "
                "pairs of a batch by one: give --trainer.devices 1"
            )

    def setup(self, stage: str) -> None:
        """Register the sums of the errors over the repetitions, which are the state of this module."""
        self.cases: list[str] = self.data.cases
        if not hasattr(self, "sums"):  # else it was loaded, or trained before
            self.register_buffer("sums", torch.zeros(len(self.cases), 2, dtype=torch.float64))
            self.register_buffer("repetitions", torch.zeros((), dtype=torch.int64))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint fits; without data, register its sums first."""
        for name in {"sums", "repetitions"} & checkpoint["state_dict"].keys() - dict(self.named_buffers()).keys():
            self.register_buffer(name, torch.zeros_like(checkpoint["state_dict"][name]))
        super().on_load_checkpoint(checkpoint)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the means over the steps so far: `train/<case>/position_error` in positions, `order_error` as a share."""
        from sklearn.linear_model import LinearRegression, LogisticRegression
        from sklearn.metrics import zero_one_loss

        data, (first, second) = self.data, batch["pairs"].cpu().T.numpy()
        order = LogisticRegression(C=1 / self.hparams.penalty, max_iter=1000)  # cross-validation fits copies of it
        errors = []
        for rows, labels in zip(data.rows.numpy(), data.labels.numpy(), strict=True):
            shuffled = torch.randperm(len(rows)).numpy()
            pairs = np.concatenate([rows[first], rows[second]], axis=1)  # (B, 2 d)
            position_error = self._mean_error(LinearRegression(), rows[shuffled], labels[shuffled], _rounded_error)
            order_error = self._mean_error(order, pairs, labels[second] > labels[first], zero_one_loss)
            errors.append([position_error, order_error])
        self.sums += torch.tensor(errors, device=self.device)
        self.repetitions += 1
        for case, means in zip(self.cases, (self.sums / self.repetitions).float(), strict=True):
            for name, mean in zip(("position_error", "order_error"), means, strict=True):
                self.log(f"train/{case}/{name}", mean)
        self.count_step()

    def _mean_error(self, model: Any, x: np.ndarray, y: np.ndarray, error: Callable[..., float]) -> float:
        """Return the mean over the folds of an error of (targets, predictions)."""
        from sklearn.metrics import make_scorer  # imported where it is used: it is slow to import
        from sklearn.model_selection import cross_val_score

        n_folds = self.hparams.n_folds
        try:
            return cross_val_score(model, x, y, cv=n_folds, scoring=make_scorer(error), error_score="raise").mean()
        except ValueError as problem:  # of scikit-learn: a fold that is empty or has only one class
            raise MisconfigurationException(
                f"model.n_folds is {n_folds}, too many for {len(x)} examples ({problem}): give fewer folds, or a "
                "larger data.batch_size"
            ) from problem


def _rounded_error(positions: np.ndarray, predictions: np.ndarray) -> float:
    """Return the mean absolute error of predictions that are rounded to whole positions."""
    return np.abs(predictions.round() - positions).mean()
