"""Metrics that are accumulated over a whole split, on all processes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.targets import IGNORED
from lightning_modules.runtime.private_names import KeepsDtypes


class SplitMetric(KeepsDtypes):
    """Base of the project's metrics: sums or lists of values over a split.

    The states keep the precision they were declared with. `trainer.precision: bf16-true` casts the tensors of a module,
    and a sum in bfloat16 stops growing once it is 256 times as large as what is added.
    """

    full_state_update = False


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross entropy of the next token in nats, computed in float32 whatever the precision of the model.

    Args:
        logits: Scores of the next token, (B, T, V).
        targets: Token ids, (B, T); `IGNORED` where a position carries no loss.
        reduction: `mean` over the positions that carry loss, or `sum`.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


class CorpusLoss(SplitMetric):
    """Loss, perplexity and bits per byte of a text.

    Perplexity depends on the tokenizer: the fewer tokens a text has, the harder each is to predict. Bits per byte does
    not: it is the length of the compressed text in bits, divided by the length of the text in UTF-8 bytes.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, targets: Tensor, target_bytes: Tensor | int = 0) -> None:
        """Add a batch.

        Args:
            nats: Cross entropy of each target, of any shape, or its sum; 0 where a position carries no loss.
            targets: Token ids, of any shape; `IGNORED` where a position carries no loss.
            target_bytes: UTF-8 bytes that the targets stand for, a scalar; 0 if unknown.
        """
        self.nats += nats.sum(dtype=torch.float64)
        self.tokens += (targets != IGNORED).sum()
        self.bytes += target_bytes

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` in nats a token, `perplexity`, and `bits_per_byte` where the number of bytes is known."""
        loss = self.nats / self.tokens
        measures = {"loss": loss, "perplexity": loss.exp()}
        if self.bytes > 0:
            measures["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        return {name: value.float() for name, value in measures.items()}
