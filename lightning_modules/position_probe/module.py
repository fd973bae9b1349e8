"""Probing position embeddings: how much of a position, an order or a distance can be read from their rows?"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_modules.base import ExperimentModule
from lightning_modules.position_probe.probes import ORDER, TARGETS, build_probes, standardized, targets_of

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

Batch = dict[str, Tensor]

SIDES = ("seen", "interpolation", "extrapolation")  # as the batches number them
REAL, RANDOM_LABELS = 0, 1  # places among the data's cases


class PositionProbeModule(ExperimentModule):
    """Probes of `models/position_probes.py` on a position matrix and on its controls, all trained at once.

    There is a probe for each case (the matrix, and each control), each fold and each target, and none shares anything
    with another. The data has the tables and the folds; the module asks it for them when a run begins.

    Args:
        probe: `linear`, `bilinear` or `mlp`.
        width: Rank of the bilinear form, or hidden units of the mlp, of each probe; at least 1.

    Raises:
        MisconfigurationException: If the width is below 1.
    """

    def __init__(self, probe: Literal["linear", "bilinear", "mlp"] = "mlp", width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        if width < 1:
            raise MisconfigurationException(f"model.width is {width}: give at least 1")
        self.scores: dict[str, Tensor] = {}  # of the last validation, see `ProbeMeasures.compute`

    def setup(self, stage: str) -> None:
        """Builds the probes for the tables of the data."""
        if hasattr(self, "probes"):
            return
        data = self.data
        self.cases: list[str] = data.cases
        labels, seen = data.labels, ~data.held_out
        rows = [standardized(table, s) for table in data.rows for s in seen]
        centre, scale = zip(*(_centre_and_scale(label[s]) for label in labels for s in seen), strict=True)
        n_cases, n_folds, n_positions = len(labels), len(seen), labels.size(1)
        for name, tensor in {
            "rows": torch.stack(rows),  # (C F, T, d)
            "labels": labels,  # (C, T)
            "centre": torch.stack(centre).view(n_cases, n_folds, 1, -1),  # (C, F, 1, K)
            "scale": torch.stack(scale).view(n_cases, n_folds, 1, -1),
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        self.probes = build_probes(self.hparams.probe, len(rows), data.rows.size(-1), len(TARGETS), self.hparams.width)
        self.measures = ProbeMeasures(n_cases, n_folds, n_positions)

    def forward(self, pairs: Tensor) -> Tensor:
        """What each probe says of each pair: (B, 2) to (C, F, B, K), targets scaled as in training, logits of order."""
        outputs = self.probes(self.rows, pairs[:, 0], pairs[:, 1])  # (C F, B, K)
        return outputs.unflatten(0, self.centre.shape[:2])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the losses of all probes, each over the pairs that its fold trains on."""
        # A sum over the pairs of a fold divided by all of the batch: so the processes' gradients average to that of
        # the whole batch, however many of its pairs a fold has on each.
        trains_on = (batch["side"] == SIDES.index("seen"))[None, :, :, None]  # (1, F, B, 1)
        losses = (self._losses(batch["pairs"])[0] * trains_on).mean(dim=2)  # (C, F, K)
        share = trains_on.float().mean()
        self.log_train_loss(losses[REAL].mean() / share, share)
        return losses.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the measures."""
        losses, outputs, targets = self._losses(batch["pairs"])
        self.measures.update(batch["pairs"], batch["side"], losses, outputs * self.scale + self.centre, targets)

    def _losses(self, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared errors, of the order the cross entropy, (C, F, B, K); the outputs; the targets (C, 1, B, K)."""
        outputs = self(pairs).float()
        targets = targets_of(self.labels[:, pairs[:, 0]], self.labels[:, pairs[:, 1]])[:, None]
        scaled = (targets - self.centre) / self.scale  # (C, F, B, K)
        losses = (outputs - scaled) ** 2
        order = F.binary_cross_entropy_with_logits(outputs[..., ORDER], scaled[..., ORDER], reduction="none")
        losses = torch.cat([losses[..., :ORDER], order[..., None], losses[..., ORDER + 1 :]], dim=-1)
        return losses, outputs, targets

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, and scores and selectivities such as `val/interpolation/order_accuracy`.

        Under `val/<side>/` those of the matrix: `order_accuracy`, and for the other targets `_explained` (R², share of
        the variance explained; 0 where the probe is worse than the mean of what it was asked) and `_error` (mean
        absolute error, in positions). `_selectivity` is the score less that under random labels. Under
        `val/<control>/interpolation/` the scores of each control.
        """
        self.scores = {name: value.cpu() for name, value in self.measures.compute().items()}
        self.measures.reset()
        score, error = self.scores["score"], self.scores["error"]
        logged = {"val/loss": self.scores["loss"]}
        for s, side in enumerate(SIDES):
            for k, target in enumerate(TARGETS):
                measure = "accuracy" if k == ORDER else "explained"
                logged[f"val/{side}/{target}_{measure}"] = score[s, REAL, k]
                logged[f"val/{side}/{target}_selectivity"] = score[s, REAL, k] - score[s, RANDOM_LABELS, k]
                if k != ORDER:
                    logged[f"val/{side}/{target}_error"] = error[s, REAL, k]
                if side == "interpolation":
                    for c, case in list(enumerate(self.cases))[RANDOM_LABELS:]:
                        logged[f"val/{case}/{side}/{target}_{measure}"] = score[s, c, k]
        # They are those of all ranks; sync_dist only tells Lightning that they are the same everywhere.
        self.log_dict({name: value.float().to(self.device) for name, value in logged.items()}, sync_dist=True)


def _centre_and_scale(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each target over all pairs of different positions: (K,) each; order as it is."""
    first, second = torch.meshgrid(labels, labels, indexing="ij")
    targets = targets_of(first, second)[~torch.eye(len(labels), dtype=torch.bool)].double()
    centre, scale = targets.mean(dim=0), targets.std(dim=0)
    centre[ORDER], scale[ORDER] = 0.0, 1.0
    return centre.float(), scale.float()


class ProbeMeasures(Metric):
    """How well the probes do on the pairs of each side, over all processes.

    Args:
        n_cases: Tables, C.
        n_folds: Folds, F.
        n_positions: Positions, T.
    """

    full_state_update = False

    def __init__(self, n_cases: int, n_folds: int, n_positions: int) -> None:
        super().__init__()
        S, C, K = len(SIDES), n_cases, len(TARGETS)  # noqa: N806
        shapes = {
            "count": (S, n_folds),
            "level": (S, n_folds, C, K),  # sum of the targets, and of their squares
            "square": (S, n_folds, C, K),
            "squared_error": (S, n_folds, C, K),
            "error_at": (S, n_positions, C, K),  # sum of the absolute errors by distance; of the order's mistakes
            "count_at": (S, n_positions),
            "loss": (S, C, K),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, pairs: Tensor, side: Tensor, losses: Tensor, predictions: Tensor, targets: Tensor) -> None:
        """Adds a batch.

        Args:
            pairs: (B, 2) positions.
            side: (F, B) numbers of `SIDES`, negative where a pair does not count for a fold.
            losses: (C, F, B, K).
            predictions: (C, F, B, K), in positions; the order's are logits.
            targets: (C, 1, B, K), in positions.
        """
        error = (predictions - targets).abs()
        error[..., ORDER] = ((predictions[..., ORDER] > 0) != (targets[..., ORDER] > 0.5)).to(error)
        distance = (pairs[:, 0] - pairs[:, 1]).abs()
        values = {
            "level": targets.expand_as(error),
            "square": (targets**2).expand_as(error),
            "squared_error": error**2,
        }
        for s in range(len(SIDES)):
            counts = (side == s).double()  # (F, B)
            self.count[s] += counts.sum(dim=1)
            self.count_at[s].index_add_(0, distance, counts.sum(dim=0))
            for name, value in values.items():
                getattr(self, name)[s] += torch.einsum("cfbk,fb->fck", value.double(), counts)
            self.loss[s] += torch.einsum("cfbk,fb->ck", losses.double(), counts)
            self.error_at[s].index_add_(0, distance, torch.einsum("cfbk,fb->bck", error.double(), counts))

    def compute(self) -> dict[str, Tensor]:
        """The measures by name; what no pair was seen of is not a number.

        - `score` (S, C, K): accuracy of the order; R² of the other targets about their mean in each fold, at least 0.
        - `error` (S, C, K): mean absolute error in positions; share of mistakes for the order.
        - `error_by_distance` (S, T, C, K) and `count_by_distance` (S, T).
        - `loss`: mean over the targets on the matrix itself, in interpolation.
        """
        count = self.count.sum(dim=1)  # (S,)
        error = self.error_at.sum(dim=1) / count[:, None, None]
        variation = self.square - self.level**2 / self.count.clamp(min=1)[..., None, None]
        score = (1 - self.squared_error.sum(dim=1) / variation.sum(dim=1)).clamp(min=0)
        score[..., ORDER] = 1 - error[..., ORDER]
        interpolation = SIDES.index("interpolation")
        return {
            "score": score,
            "error": error,
            "error_by_distance": self.error_at / self.count_at[..., None, None],
            "count_by_distance": self.count_at,
            "loss": self.loss[interpolation, REAL].mean() / count[interpolation],
        }


class WangChenModule(ExperimentModule):
    """The two experiments of Wang and Chen (2020), section 3, with their settings, on a matrix and its controls.

    - Absolute position: linear regression from a row to its position, predictions rounded to whole positions, the mean
      absolute error over five folds of the rows in random order.
    - Order: logistic regression from the two rows of a pair, side by side, to which comes first; the error rate over
      five folds of random pairs. A batch is the pairs of one repetition: theirs has 512.

    Both have a solution in closed form or as good as that, so a training step learns nothing that lasts: it is a
    repetition, with other pairs and other folds. Rows are taken as they are, not standardised.

    Args:
        n_folds: Folds, at least 2.
        penalty: Strength of the logistic regression's L2 penalty (1 is scikit-learn's default, which they used).

    Raises:
        MisconfigurationException: If there are fewer than 2 folds, or the penalty is not positive.
    """

    def __init__(self, n_folds: int = 5, penalty: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        if n_folds < 2 or penalty <= 0:
            raise MisconfigurationException(
                f"model.n_folds is {n_folds} and model.penalty {penalty}: give at least 2 folds and a penalty above 0"
            )
        self.automatic_optimization = False
        # Lightning counts steps by its optimiser, so there is one, over a parameter that nothing depends on.
        self.unused = nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser that only counts steps; the YAML's `optimizer:` has nothing to do here."""
        return torch.optim.SGD([self.unused], lr=0.0)

    def setup(self, stage: str) -> None:
        """Makes room for the sums over the repetitions, which are this module's state."""
        self.cases: list[str] = self.data.cases
        self.register_buffer("sums", torch.zeros(len(self.cases), 2, dtype=torch.float64))
        self.register_buffer("repetitions", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs `train/<case>/position_error`, in positions, and `order_error`, a share: means of the steps so far.

        Raises:
            MisconfigurationException: If there are too few positions or pairs for the folds.
        """
        from sklearn.linear_model import LinearRegression, LogisticRegression

        data, (first, second) = self.data, batch["pairs"].cpu().T.numpy()
        errors = []
        for rows, labels in zip(data.rows.numpy(), data.labels.numpy(), strict=True):
            shuffled = torch.randperm(len(rows)).numpy()
            pairs = np.concatenate([rows[first], rows[second]], axis=1)  # (B, 2 d)
            order = LogisticRegression(C=1 / self.hparams.penalty, max_iter=1000)
            errors.append(
                [
                    self._mean_error(LinearRegression(), rows[shuffled], labels[shuffled], _rounded_error),
                    self._mean_error(order, pairs, labels[second] > labels[first], _mistakes),
                ]
            )
        self.sums += torch.tensor(errors, device=self.device)
        self.repetitions += 1
        means = (self.sums / self.repetitions).float()
        for case, (position_error, order_error) in zip(self.cases, means, strict=True):
            self.log(f"train/{case}/position_error", position_error, sync_dist=True)
            self.log(f"train/{case}/order_error", order_error, sync_dist=True)
        self.optimizers().step()

    def _mean_error(self, model: "BaseEstimator", x: np.ndarray, y: np.ndarray, error: Callable[..., float]) -> float:
        from sklearn.model_selection import cross_val_score

        try:
            return cross_val_score(model, x, y, cv=self.hparams.n_folds, scoring=error, error_score="raise").mean()
        except ValueError as problem:  # scikit-learn's: a fold that is empty or has only one class
            raise MisconfigurationException(
                f"model.n_folds is {self.hparams.n_folds}, too many for {len(x)} examples ({problem}): give fewer "
                "folds, or a larger data.batch_size"
            ) from problem


def _rounded_error(model: "BaseEstimator", x: np.ndarray, y: np.ndarray) -> float:
    """Mean absolute error of the predictions, rounded."""
    return np.abs(model.predict(x).round() - y).mean()


def _mistakes(model: "BaseEstimator", x: np.ndarray, y: np.ndarray) -> float:
    """Share of wrong predictions."""
    return (model.predict(x) != y).mean()
