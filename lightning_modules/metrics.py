"""Measures of a language model over a whole corpus."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

IGNORED = -100  # target of a position that carries no loss


def next_token_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of the next token, computed in float32 whatever the precision of the model.

    Args:
        logits: Scores of the next token, (B, T, V).
        targets: Token ids, (B, T); `IGNORED` where a position carries no loss.
        reduction: `mean` over the positions that carry loss, or `sum`.

    Returns:
        A scalar, in nats.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


class CorpusLoss(Metric):
    """Loss, perplexity and bits per byte over all tokens seen, on all processes.

    Perplexity depends on the tokenizer: the fewer tokens a text has, the harder each is. Bits per byte does not: it is
    the length of the compressed text, in bits, over the length of the text in UTF-8 bytes.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, target_bytes: Tensor) -> None:
        """Adds a batch.

        Args:
            logits: Scores of the next token, (B, T, V).
            targets: Token ids, (B, T); `IGNORED` where a position carries no loss.
            target_bytes: UTF-8 bytes that the targets stand for, a scalar.
        """
        self.nats += next_token_loss(logits, targets, reduction="sum")
        self.tokens += (targets != IGNORED).sum()
        self.bytes += target_bytes

    def compute(self) -> dict[str, Tensor]:
        """The measures by name: `loss` (nats a token), `perplexity`, `bits_per_byte`."""
        loss = self.nats / self.tokens
        measures = {"loss": loss, "perplexity": loss.exp()}
        if self.bytes > 0:
            measures["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        return {name: value.float() for name, value in measures.items()}
