"""Scores and errors of the probes, accumulated over a split."""

import torch
from torch import Tensor

from lightning_modules.metrics import SplitMetric
from lightning_modules.position_probe.probes import ORDER, TARGETS

SIDES = ("seen", "interpolation", "extrapolation")  # in the order of their numbers in a batch
REAL, RANDOM_LABELS = 0, 1  # indices among the cases of the data


class ProbeMeasures(SplitMetric):
    """Scores and errors of the probes on the pairs of each side, for C cases, F folds and T positions."""

    def __init__(self, n_cases: int, n_folds: int, n_positions: int) -> None:
        super().__init__()
        S, C, F, T, K = len(SIDES), n_cases, n_folds, n_positions, len(TARGETS)  # noqa: N806
        shapes: dict[str, tuple[int, ...]] = {
            "count": (S, F),
            "level": (S, F, C, K),  # sum of the targets
            "square": (S, F, C, K),  # sum of their squares
            "squared_error": (S, F, C, K),
            "error_at": (S, T, C, K),  # sum of the absolute errors by distance; of the mistakes for the order
            "count_at": (S, T),
            "loss": (S, C, K),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, pairs: Tensor, side: Tensor, losses: Tensor, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            pairs: Positions, (B, 2).
            side: Indices into `SIDES`, (F, B); negative where a pair does not count for a fold.
            losses: Loss of each probe, (C, F, B, K).
            predictions: In positions, and logits for the order, (C, F, B, K).
            targets: In positions, (C, 1, B, K).
        """
        error = (predictions - targets).abs()
        error[..., ORDER] = ((predictions[..., ORDER] > 0) != (targets[..., ORDER] > 0.5)).to(error)
        distance = (pairs[:, 0] - pairs[:, 1]).abs()
        targets = targets.expand_as(error)
        values = {"level": targets, "square": targets**2, "squared_error": error**2}
        for s in range(len(SIDES)):
            counts = (side == s).double()  # (F, B)
            self.count[s] += counts.sum(dim=1)
            self.count_at[s].index_add_(0, distance, counts.sum(dim=0))
            for name, value in values.items():
                getattr(self, name)[s] += torch.einsum("cfbk,fb->fck", value.double(), counts)
            self.loss[s] += torch.einsum("cfbk,fb->ck", losses.double(), counts)
            self.error_at[s].index_add_(0, distance, torch.einsum("cfbk,fb->bck", error.double(), counts))

    def compute(self) -> dict[str, Tensor]:
        """Return the measures by name; NaN where there was no pair.

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
