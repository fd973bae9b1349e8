"""Probing of position embeddings: how well positions, orders and distances can be predicted from their rows."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.base import CompileMode, ExperimentModule, Loss
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.position_probe.measures import RANDOM_LABELS, REAL, SIDES, ProbeMeasures
from lightning_modules.position_probe.probes import ORDER, PROBES, TARGETS, standardized, targets_of

Batch = dict[str, Tensor]


class PositionProbeModule(ExperimentModule):
    """Probes of a position matrix and of its controls, all trained at once.

    There is one probe for each case (the matrix, and each control), each fold and each target. The module reads
    `cases`, `rows`, `labels` and `held_out` of the data; see `PositionProbeDataModule`.

    Args:
        probe: `linear`, `bilinear` or `mlp`.
        width: Rank of the bilinear form, or hidden units of the mlp, of each probe; unused by the linear probe.
    """

    def __init__(
        self,
        probe: Literal["linear", "bilinear", "mlp"] = "mlp",
        width: PositiveInt = 16,
        compile: CompileMode = False,
    ) -> None:
        super().__init__(compile)
        self.save_hyperparameters()
        self.scores: dict[str, Tensor] = {}  # of the last validation, see `ProbeMeasures.compute`

    def setup(self, stage: str) -> None:
        """Build the probes for the tables of the data."""
        if hasattr(self, "rows"):
            return
        data = self.data
        self.cases: list[str] = data.cases
        labels, seen = data.labels, ~data.held_out
        rows = [standardized(table, s) for table in data.rows for s in seen]
        mean, scale = zip(*(_mean_and_scale(label[s]) for label in labels for s in seen), strict=True)
        n_cases, n_folds, n_positions = len(labels), len(seen), labels.size(1)
        for name, tensor in {
            "rows": torch.stack(rows),  # (C F, T, d)
            "labels": labels,  # (C, T)
            "centre": torch.stack(mean).view(n_cases, n_folds, 1, -1),  # (C, F, 1, K)
            "scale": torch.stack(scale).view(n_cases, n_folds, 1, -1),
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        self._build_probes(len(rows), data.rows.size(-1))
        self.track(ProbeMeasures(n_cases, n_folds, n_positions))

    def _build_probes(self, n_tables: int, n_embd: int) -> None:
        if not hasattr(self, "probes"):
            self.probes = PROBES[self.hparams.probe](n_tables, n_embd, len(TARGETS), self.hparams.width)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint fits; without data, build its probes first."""
        self._build_probes(*checkpoint["state_dict"].get("probes.first", torch.empty(0, 0)).shape[:2])
        super().on_load_checkpoint(checkpoint)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the predictions for pairs (B, 2), (C, F, B, K), scaled as in training; logits for the order."""
        outputs = self.probes(self.rows, pairs[:, 0], pairs[:, 1])  # (C F, B, K)
        return outputs.unflatten(0, self.centre.shape[:2])

    def loss(self, batch: Batch) -> Loss:
        """Return the sum of the losses of all probes, each over the training pairs of its fold.

        `train/loss` is the mean loss of the probes of the matrix.
        """
        # The sum over the pairs of a fold is divided by the size of the whole batch. So the gradients of several
        # processes average to that of the global batch, even if the processes have different shares of a fold's pairs.
        trains_on = (batch["side"] == SIDES.index("seen"))[None, :, :, None]  # (1, F, B, 1)
        losses = (self._losses(batch["pairs"])[0] * trains_on).mean(dim=2)  # (C, F, K)
        share = trains_on.float().mean()
        return Loss(losses.sum(), losses[REAL].mean() / share, share)

    def evaluation_step(self, batch: Batch, metrics: ProbeMeasures) -> None:
        """Add a batch to the measures."""
        losses, outputs, targets = self._losses(batch["pairs"])
        metrics.update(batch["pairs"], batch["side"], losses, outputs * self.scale + self.centre, targets)

    def _losses(self, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return squared errors (cross entropy for the order) and outputs, (C, F, B, K), and targets, (C, 1, B, K)."""
        outputs = self(pairs).float()
        targets = targets_of(self.labels[:, pairs[:, 0]], self.labels[:, pairs[:, 1]])[:, None]
        scaled = (targets - self.centre) / self.scale  # (C, F, B, K)
        losses = (outputs - scaled) ** 2
        order = F.binary_cross_entropy_with_logits(outputs[..., ORDER], scaled[..., ORDER], reduction="none")
        return losses.select_scatter(order, -1, ORDER), outputs, targets

    def evaluation_results(self, metrics: ProbeMeasures, split: str) -> Mapping[str, Tensor]:
        """Return `loss`, and scores and selectivities such as `interpolation/order_accuracy`.

        - `<side>/<target>_...` are of the matrix. `order_accuracy` is a share; the other targets have `_explained`
          (R², at least 0) and `_error` (mean absolute error in positions).
        - `_selectivity` is the score minus the score under random labels.
        - `<control>/interpolation/...` are the scores of each control.
        """
        self.scores = {name: value.cpu() for name, value in metrics.compute().items()}
        score, error = self.scores["score"], self.scores["error"]
        results = {"loss": self.scores["loss"]}
        for s, side in enumerate(SIDES):
            for k, target in enumerate(TARGETS):
                measure = "accuracy" if k == ORDER else "explained"
                results[f"{side}/{target}_{measure}"] = score[s, REAL, k]
                results[f"{side}/{target}_selectivity"] = score[s, REAL, k] - score[s, RANDOM_LABELS, k]
                if k != ORDER:
                    results[f"{side}/{target}_error"] = error[s, REAL, k]
                if side == "interpolation":
                    for c, case in list(enumerate(self.cases))[RANDOM_LABELS:]:
                        results[f"{case}/{side}/{target}_{measure}"] = score[s, c, k]
        return {name: value.float().to(self.device) for name, value in results.items()}


def _mean_and_scale(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each target over all pairs, (K,) each; 0 and 1 for the order, a class."""
    first, second = torch.meshgrid(labels, labels, indexing="ij")
    targets = targets_of(first, second)[~torch.eye(len(labels), dtype=torch.bool)].double()
    mean, scale = targets.mean(dim=0), targets.std(dim=0)
    mean[ORDER], scale[ORDER] = 0.0, 1.0
    return mean.float(), scale.float()
