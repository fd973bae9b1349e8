"""The neural probabilistic language model of Bengio, Ducharme, Vincent and Jauvin (2003), equation by equation.

Every word has a vector of features, a row of C. The vectors of the n - 1 words before position t are concatenated,

    x = (C(w_{t-1}), C(w_{t-2}), ..., C(w_{t-n+1})),

and the scores and probabilities of the next word are

    y = b + W x + U tanh(d + H x),        P(w_t = i | w_{t-1}, ..., w_{t-n+1}) = e^{y_i} / sum_j e^{y_j}.

W x are direct connections from the features to the output, which some models of the paper have.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.linear_cross_entropy import linear_cross_entropy


class BengioNLM(nn.Module):
    """The network for a vocabulary of |V| words; its parameters have the names of the paper.

    Windows have n words, including the predicted one; a word has m features. There are h hidden units, and direct
    connections W if `direct` is true. In training, `dropout` is the probability of dropping a component of x,
    `hidden_dropout` a hidden unit, and `word_dropout` all features of a word of the context. The first two scale what
    they keep by 1 / (1 - probability); `word_dropout` does not.
    """

    def __init__(
        self,
        vocab_size: int,
        n: int = 5,
        h: int = 50,
        m: int = 60,
        direct: bool = True,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout, self.hidden_dropout, self.word_dropout = dropout, hidden_dropout, word_dropout
        width = (n - 1) * m
        self.C = nn.Parameter(0.1 * torch.randn(vocab_size, m))
        self.H = nn.Parameter(torch.randn(h, width) / math.sqrt(width)) if h else None
        self.d = nn.Parameter(torch.zeros(h)) if h else None
        self.U = nn.Parameter(0.05 * torch.randn(vocab_size, h)) if h else None
        self.W = nn.Parameter(torch.zeros(vocab_size, width)) if direct else None
        self.b = nn.Parameter(torch.zeros(vocab_size))

    def features(self, context: Tensor) -> Tensor:
        """Return x, (B, (n - 1) m), the concatenated features of the words before, (B, n - 1), the nearest first."""
        x = F.embedding(context, self.C)  # (B, n - 1, m)
        if self.training and self.word_dropout:
            x = x * (torch.rand(x.shape[:2], device=x.device) >= self.word_dropout)[..., None]
        return F.dropout(x.flatten(1), self.dropout, self.training)

    def hidden(self, x: Tensor) -> Tensor:
        """Return tanh(d + H x), (B, h), for features x (B, (n - 1) m)."""
        return F.dropout(torch.tanh(F.linear(x, self.H, self.d)), self.hidden_dropout, self.training)

    def forward(self, context: Tensor) -> Tensor:
        """Return y, the scores of the next word, (B, V), for the words before, (B, n - 1), the nearest first."""
        x = self.features(context)
        y = self.b
        if self.W is not None:
            y = y + F.linear(x, self.W)
        if self.U is not None:
            y = y + F.linear(self.hidden(x), self.U)
        return y

    def loss(self, context: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of -log P(w_t | context) in nats: the cross entropy of `forward`, computed in less time."""
        x = self.features(context)
        terms = []  # inputs (B, k) and weights (V, k), whose products are summed
        if self.W is not None:
            terms.append((x, self.W))
        if self.U is not None:
            terms.append((self.hidden(x), self.U))
        inputs, weights = (torch.cat(parts, dim=1) for parts in zip(*terms, strict=True))
        return linear_cross_entropy(inputs, weights, targets, self.b)
