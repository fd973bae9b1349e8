"""The neural probabilistic language model of Bengio, Ducharme, Vincent and Jauvin (2003), equation by equation.

Every word has a vector of features, a row of C. The vectors of the n - 1 words before position t stand side by side,

    x = (C(w_{t-1}), C(w_{t-2}), ..., C(w_{t-n+1})),

and the next word has the scores and the probability

    y = b + W x + U tanh(d + H x),        P(w_t = i | w_{t-1}, ..., w_{t-n+1}) = e^{y_i} / sum_j e^{y_j}.

W x are the direct connections from the features to the output, which the paper has in some of its models.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.linear_cross_entropy import LinearCrossEntropy


class BengioNLM(nn.Module):
    """The network, its parameters named as in the paper.

    Args:
        vocab_size: Number of words, |V|.
        n: Words in a window, the predicted one included.
        h: Hidden units; 0 for none.
        m: Features of a word.
        direct: Whether there are direct connections W.
        dropout: Share of the features x that is dropped in training (0 to 1).
        hidden_dropout: Share of the hidden units that is dropped in training (0 to 1).
        word_dropout: Share of the context's words that is dropped in training, all features at once (0 to 1).

    Raises:
        ValueError: If the sizes make no network.
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
        for name, value, least in (("vocab_size", vocab_size, 2), ("n", n, 2), ("m", m, 1), ("h", h, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if h == 0 and not direct:
            raise ValueError("h is 0 and direct is false: nothing connects the words to the output; set one of them")
        self.rates = {"dropout": dropout, "hidden_dropout": hidden_dropout, "word_dropout": word_dropout}
        for name, rate in self.rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}: it must be at least 0 and less than 1")
        width = (n - 1) * m
        self.C = nn.Parameter(0.1 * torch.randn(vocab_size, m))
        self.H = nn.Parameter(torch.randn(h, width) / math.sqrt(width)) if h else None
        self.d = nn.Parameter(torch.zeros(h)) if h else None
        self.U = nn.Parameter(0.05 * torch.randn(vocab_size, h)) if h else None
        self.W = nn.Parameter(torch.zeros(vocab_size, width)) if direct else None
        self.b = nn.Parameter(torch.zeros(vocab_size))
        self._cross_entropy = LinearCrossEntropy()

    def features(self, context: Tensor) -> Tensor:
        """x: the words before (B, n - 1), the nearest first, to their features side by side (B, (n - 1) m)."""
        x = F.embedding(context, self.C)  # (B, n - 1, m)
        if self.training and self.rates["word_dropout"]:
            x = x * (torch.rand(x.shape[:2], device=x.device) >= self.rates["word_dropout"])[..., None]
        return F.dropout(x.flatten(1), self.rates["dropout"], self.training)

    def hidden(self, x: Tensor) -> Tensor:
        """tanh(d + H x): (B, (n - 1) m) to (B, h)."""
        return F.dropout(torch.tanh(F.linear(x, self.H, self.d)), self.rates["hidden_dropout"], self.training)

    def forward(self, context: Tensor) -> Tensor:
        """y: the words before (B, n - 1), the nearest first, to the scores of the next word (B, V)."""
        x = self.features(context)
        y = self.b
        if self.W is not None:
            y = y + F.linear(x, self.W)
        if self.U is not None:
            y = y + F.linear(self.hidden(x), self.U)
        return y

    def loss(self, context: Tensor, targets: Tensor) -> Tensor:
        """Mean of -log P(w_t | context), in nats: what `forward` and a cross entropy give, in less time.

        Args:
            context: Words before, the nearest first, (B, n - 1).
            targets: Words to predict, (B,).
        """
        x = self.features(context)
        terms = [(x.new_ones(len(x), 1), self.b[:, None])]  # b is the weight of an input that is always 1
        if self.W is not None:
            terms.append((x, self.W))
        if self.U is not None:
            terms.append((self.hidden(x), self.U))
        return self._cross_entropy(terms, targets)
