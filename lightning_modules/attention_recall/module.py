"""Associative recall: does a network find the value that followed a key?"""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.attention_recall.network import AttentionNetwork, Part
from lightning_modules.base import CompileMode, ExperimentModule, total_norm
from lightning_modules.common.ranges import PositiveInt
from lightning_modules.common.targets import IGNORED
from lightning_modules.metrics import SplitMetric, next_token_loss
from lightning_modules.models.attention import MultiHeadAttention, recorded_weights
from lightning_modules.runtime.drawing import log_before_training

Batch = dict[str, Tensor]


class AttentionRecallModule(ExperimentModule):
    """The `AttentionNetwork`, trained on multi-query associative recall (Arora et al., 2023).

    Before the first step it logs `init/attention_entropy`, `init/grad_norm` and `init/grad_norm_query_key` of the first
    training batch; the last is the norm over the weights of the queries and keys. Validation and test log `loss`,
    `accuracy` (also by number of pairs and by distance) and `attention_entropy`.

    Args:
        vocab_size: Number of tokens; linked from the data.
        block_size: Length of a sequence, in tokens; linked from the data.
        n_layer: Number of blocks.
        n_head: Number of attention heads of a block; divides `n_embd`.
        n_embd: Width C of the residual stream.
        without: Parts to leave out, any of: `scale` (the division of dot products by the root of their length,
            `n_embd / n_head`), `mask` (without it a position attends to the future, too), `positions` (the position
            embedding), `residual` (without it the output of a layer replaces its input), `norm`, `feed_forward`.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        block_size: int | None = None,
        n_layer: PositiveInt = 2,
        n_head: PositiveInt = 1,
        n_embd: PositiveInt = 64,
        without: Sequence[Part] = (),
        compile: CompileMode = False,
    ) -> None:
        super().__init__(compile)
        self.save_hyperparameters()
        vocab_size, block_size = self.linked(vocab_size=vocab_size, block_size=block_size)
        try:
            self.network = AttentionNetwork(vocab_size, block_size, n_layer, n_head, n_embd, without)
        except ValueError as error:
            raise MisconfigurationException(f"model: {error}") from error
        self.track(RecallMetrics(block_size, n_layer, n_head))
        self.last_validation: dict[str, Tensor] = {}  # results of `RecallMetrics`

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the scores of every token as the answer: (B, T) to (B, T, V)."""
        return self.network(input_ids)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient before the first step."""
        if self.global_step == 0:
            layers = [layer for layer in self.network.modules() if isinstance(layer, MultiHeadAttention)]
            query_key = [layer.qkv.weight.grad.chunk(3)[part] for layer in layers for part in (0, 1)]
            everything = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            norms = {"grad_norm": everything, "grad_norm_query_key": query_key}
            self._log_at_start({name: total_norm(parts) for name, parts in norms.items()})

    def _log_at_start(self, values: dict[str, Tensor]) -> None:
        reduce = self.trainer.strategy.reduce
        means = {f"init/{name}": float(reduce(value, reduce_op="mean")) for name, value in values.items()}
        log_before_training(self.trainer, means)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log it; before the first step, log the entropy of attention."""
        if self.global_step == 0 and batch_idx == 0:
            with torch.no_grad(), recorded_weights(self.network) as weights:
                self(batch["input_ids"])
            self._log_at_start({"attention_entropy": attention_entropy(weights, batch["targets"]).mean()})
        return super().training_step(batch, batch_idx)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the answers."""
        return next_token_loss(self(batch["input_ids"]), batch["targets"])

    def evaluation_step(self, batch: Batch, metrics: "RecallMetrics") -> None:
        """Update the metrics with a batch."""
        with recorded_weights(self.network) as weights:
            logits = self(batch["input_ids"])
        metrics.update(logits, weights, **{name: batch[name] for name in ("targets", "distances", "n_pairs")})

    def evaluation_results(self, metrics: "RecallMetrics", split: str) -> Mapping[str, Tensor]:
        """Return the results by name; keep those of a validation for `AttentionReport`."""
        found = metrics.compute()
        if split == "val":
            self.last_validation = found
        return by_name(found)


def attention_entropy(weights: list[Tensor], targets: Tensor) -> Tensor:
    """Return the entropy -Σ w ln w of the attention at each of the N queries, in nats: (n_layer, H, N).

    Args:
        weights: Attention weights of each layer, (B, H, T, S).
        targets: Answers, (B, T); `IGNORED` where there is no query.
    """
    entropy = torch.special.entr(torch.stack(weights).float()).sum(dim=-1)  # (n_layer, B, H, T)
    return entropy.transpose(1, 2)[:, :, targets != IGNORED]


class RecallMetrics(SplitMetric):
    """Loss, accuracy and entropy of attention over all answers, on all processes.

    Args:
        block_size: Length of a sequence, in tokens.
        n_layer: Number of attention layers.
        n_head: Number of heads of a layer.
    """

    def __init__(self, block_size: int, n_layer: int, n_head: int) -> None:
        super().__init__()
        states = {
            "asked": torch.zeros(block_size // 2 + 1, block_size, dtype=torch.int64),  # by pairs and by distance
            "correct": torch.zeros(block_size // 2 + 1, block_size, dtype=torch.int64),
            "nats": torch.zeros((), dtype=torch.float64),
            "entropy": torch.zeros(n_layer, n_head, dtype=torch.float64),
        }
        for name, state in states.items():
            self.add_state(name, state, dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, weights: list[Tensor], targets: Tensor, distances: Tensor, n_pairs: Tensor
    ) -> None:
        """Add a batch.

        Args:
            logits: Scores of the answers, (B, T, V).
            weights: Attention weights of each layer, (B, H, T, T).
            targets: Answers, (B, T); `IGNORED` where there is no query.
            distances: Number of positions between the key of the pair and its query, (B, T).
            n_pairs: Pairs in each sequence, (B,).
        """
        asked = targets != IGNORED
        cells = (n_pairs[:, None] * targets.size(1) + distances)[asked]  # (N,), the cell of each answer in the tables
        correct = (logits.argmax(dim=-1) == targets)[asked]
        self.asked += cells.bincount(minlength=self.asked.numel()).view_as(self.asked)
        self.correct += cells[correct].bincount(minlength=self.correct.numel()).view_as(self.correct)
        self.nats += next_token_loss(logits, targets, reduction="sum")
        self.entropy += attention_entropy(weights, targets).sum(dim=-1)

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` () and `entropy` (n_layer, n_head) in nats, `asked` and `correct` (pairs, distance)."""
        total = self.asked.sum()
        means = {"loss": self.nats / total, "entropy": self.entropy / total}
        return means | {"asked": self.asked, "correct": self.correct}


def by_name(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics by name: `loss`, `accuracy`, `accuracy/pairs_4`, `accuracy/distance_08_15` and so on."""
    asked, correct = found["asked"], found["correct"]
    entropy = torch.atleast_2d(found["entropy"])  # torchmetrics returns a scalar for one layer and head
    metrics = {"loss": found["loss"], "accuracy": correct.sum() / asked.sum()}
    for n_pairs in asked.sum(dim=1).nonzero().flatten().tolist():
        metrics[f"accuracy/pairs_{n_pairs}"] = correct[n_pairs].sum() / asked[n_pairs].sum()
    for power in range(asked.size(1).bit_length()):
        near, far = 2**power, 2 ** (power + 1)
        if (asked_here := asked[:, near:far].sum()) > 0:
            metrics[f"accuracy/distance_{near:02d}_{far - 1:02d}"] = correct[:, near:far].sum() / asked_here
    metrics["attention_entropy"] = entropy.mean()
    for layer, head in torch.cartesian_prod(*map(torch.arange, entropy.shape)).tolist():
        metrics[f"attention_entropy/layer_{layer}_head_{head}"] = entropy[layer, head]
    return {name: value.float() for name, value in metrics.items()}
