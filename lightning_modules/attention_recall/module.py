"""Associative recall (notebooks 3.1 to 3.3): can a network find the value that stood beside a key?"""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.attention_recall.network import AttentionNetwork, Part
from lightning_modules.base import ExperimentModule, total_norm
from lightning_modules.common.targets import IGNORED
from lightning_modules.metrics import next_token_loss
from lightning_modules.models.attention import MultiHeadAttention, recorded_weights

Batch = dict[str, Tensor]


class AttentionRecallModule(ExperimentModule):
    """The network of `models/attention_network.py` on multi-query associative recall (Arora et al., 2023).

    Before the first step it logs `init/attention_entropy`, `init/grad_norm` and `init/grad_norm_query_key`, the last
    over the weights that make queries and keys, all of the first training batch.

    Args:
        vocab_size: Number of tokens; linked from the data.
        block_size: Length of a sequence, in tokens; linked from the data.
        n_layer: Number of blocks, at least 1.
        n_head: Attention heads a block; divides `n_embd`.
        n_embd: Width of the residual stream.
        without: Parts to leave out, any of: `scale` (the division of dot products by the root of their length,
            `n_embd / n_head`), `mask` (without it a position sees the future too), `positions` (the embedding that says
            where a token stands), `residual` (without it a layer's result takes the place of what the layer read),
            `norm`, `feed_forward`.

    Raises:
        MisconfigurationException: If the sizes do not fit each other.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        block_size: int | None = None,
        n_layer: int = 2,
        n_head: int = 1,
        n_embd: int = 64,
        without: Sequence[Part] = (),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if vocab_size is None or block_size is None:
            raise MisconfigurationException(
                "model: vocab_size and block_size are needed; the data gives them, or you do"
            )
        try:
            self.network = AttentionNetwork(vocab_size, block_size, n_layer, n_head, n_embd, without)
        except ValueError as error:
            raise MisconfigurationException(f"model: {error}") from error
        self.val_measures = RecallMeasures(block_size, n_layer, n_head)
        self.test_measures = RecallMeasures(block_size, n_layer, n_head)
        self.last_validation: dict[str, Tensor] = {}  # what `RecallMeasures` found

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores of every token as the answer: (B, T) to (B, T, V)."""
        return self.network(input_ids)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measures the gradient of the first step."""
        if self.global_step == 0:
            layers = [layer for layer in self.network.modules() if isinstance(layer, MultiHeadAttention)]
            query_key = [layer.qkv.weight.grad.chunk(3)[part] for layer in layers for part in (0, 1)]
            everything = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            norms = {"grad_norm": everything, "grad_norm_query_key": query_key}
            self._log_before_training({name: total_norm(parts) for name, parts in norms.items()})

    def _log_before_training(self, measures: dict[str, Tensor]) -> None:
        reduce = self.trainer.strategy.reduce
        metrics = {f"init/{name}": float(reduce(value, reduce_op="mean")) for name, value in measures.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=None)  # no step is done

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the answers; before the first step, a look at attention."""
        if self.global_step == 0 and batch_idx == 0:
            with torch.no_grad(), recorded_weights(self.network) as weights:
                self(batch["input_ids"])
            self._log_before_training({"attention_entropy": attention_entropy(weights, batch["targets"]).mean()})
        loss = next_token_loss(self(batch["input_ids"]), batch["targets"])
        self.log_train_loss(loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the measures of the validation set."""
        self._measure(self.val_measures, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/accuracy` (also by number of pairs and distance), `val/attention_entropy`."""
        self.last_validation = self._log_measures("val", self.val_measures)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the measures of the test set."""
        self._measure(self.test_measures, batch)

    def on_test_epoch_end(self) -> None:
        """Logs the same measures as a validation, under `test/`."""
        self._log_measures("test", self.test_measures)

    def _measure(self, measures: "RecallMeasures", batch: Batch) -> None:
        with recorded_weights(self.network) as weights:
            logits = self(batch["input_ids"])
        measures.update(logits, weights, **{name: batch[name] for name in ("targets", "distances", "n_pairs")})

    def _log_measures(self, split: str, measures: "RecallMeasures") -> dict[str, Tensor]:
        found = measures.compute()
        measures.reset()
        # The measures are already those of all ranks; sync_dist only tells Lightning that they are the same everywhere.
        self.log_dict({f"{split}/{name}": value for name, value in by_name(found).items()}, sync_dist=True)
        return found


def attention_entropy(weights: list[Tensor], targets: Tensor) -> Tensor:
    """How widely the queries that ask look around: -Σ w ln w, in nats, 0 at one position, ln n at n alike.

    Args:
        weights: Of each layer, (B, H, T, S).
        targets: (B, T), `IGNORED` where nothing is asked.

    Returns:
        (n_layer, H, N), for each of the N answers.
    """
    entropy = torch.special.entr(torch.stack(weights).float()).sum(dim=-1)  # (n_layer, B, H, T)
    return entropy.transpose(1, 2)[:, :, targets != IGNORED]


class RecallMeasures(Metric):
    """Loss, accuracy and attention over all answers seen, on all processes.

    Args:
        block_size: Length of a sequence.
        n_layer: Number of attention layers.
        n_head: Heads of each.
    """

    full_state_update = False

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
        """Adds a batch.

        Args:
            logits: Scores of the answers, (B, T, V).
            weights: Attention weights of each layer, (B, H, T, T).
            targets: Answers, (B, T); `IGNORED` where nothing is asked.
            distances: How far back the pair stands, (B, T).
            n_pairs: Pairs in each sequence, (B,).
        """
        asked = targets != IGNORED
        cells = (n_pairs[:, None] * targets.size(1) + distances)[asked]  # (N,), a cell of the tables for each answer
        correct = (logits.argmax(dim=-1) == targets)[asked]
        self.asked += cells.bincount(minlength=self.asked.numel()).view_as(self.asked)
        self.correct += cells[correct].bincount(minlength=self.correct.numel()).view_as(self.correct)
        self.nats += next_token_loss(logits, targets, reduction="sum")
        self.entropy += attention_entropy(weights, targets).sum(dim=-1)

    def compute(self) -> dict[str, Tensor]:
        """Loss () in nats an answer, entropy (n_layer, n_head) in nats; asked and correct, counts (pairs, distance)."""
        total = self.asked.sum()
        means = {"loss": self.nats / total, "entropy": self.entropy / total}
        return means | {"asked": self.asked, "correct": self.correct}


def by_name(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The measures as metrics: `loss`, `accuracy`, `accuracy/pairs_4`, `accuracy/distance_08_15` and so on.

    Args:
        found: Result of `RecallMeasures`.
    """
    asked, correct = found["asked"], found["correct"]
    entropy = torch.atleast_2d(found["entropy"])  # of one layer and head torchmetrics makes a scalar
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
