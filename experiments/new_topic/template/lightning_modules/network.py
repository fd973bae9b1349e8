"""The network, in plain torch."""

import torch
from torch import Tensor, nn


class MajorityNetwork(nn.Module):
    """The mean of token embeddings, then one hidden layer.

    Args:
        vocab_size: Number of tokens, V.
        n_classes: Number of classes, K.
        width: Length of an embedding and of the hidden layer, C.
    """

    def __init__(self, vocab_size: int, n_classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, n_classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return scores of the classes: (B, T) to (B, K)."""
        mean = self.embedding(input_ids).mean(dim=1)  # (B, C)
        return self.out(torch.relu(self.hidden(mean)))
