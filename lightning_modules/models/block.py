"""The pre-norm block: attention mixes positions, a feed-forward network transforms each position (notebook 3.3).

    x = x + Dropout(Attention(LayerNorm(x)))
    x = x + Dropout(FeedForward(LayerNorm(x)))

    FeedForward(x) = W_2 GELU(W_1 x + b_1) + b_2,    W_1: C -> 4C,  W_2: 4C -> C
    LayerNorm(x) = (x - mean(x)) / √(var(x) + ε) · γ + β,    over the C features of each position

Each half reads a normalised copy of x and adds its result to x. The sum itself, the residual stream, is not normalised
between blocks, so the gradient of the last block reaches the first one unchanged. The original transformer normalises
after each sum; a network that normalises before each half trains without a long warm-up.

Papers: Vaswani et al., "Attention Is All You Need" (2017), section 3.3; Radford et al., "Language Models are
Unsupervised Multitask Learners" (GPT-2, 2019), section 2.3; Xiong et al., "On Layer Normalization in the Transformer
Architecture" (2020), https://arxiv.org/abs/2002.04745; Ba et al., "Layer Normalization" (2016),
https://arxiv.org/abs/1607.06450; Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016),
https://arxiv.org/abs/1606.08415.
"""

from typing import Literal

from torch import Tensor, nn

from lightning_modules.models.attention import MultiHeadAttention
from lightning_modules.models.cache import KeyValueCache

LAYER_NORM_EPSILON = 1e-5  # GPT-2's


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, the same at every position.

    Args:
        n_embd: Width C of the input and the output; the hidden layer is four times as wide.
        bias: Whether the linear layers have biases.
    """

    def __init__(self, n_embd: int, bias: bool = True) -> None:
        super().__init__()
        self.expansion = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.activation = nn.GELU(approximate="tanh")  # the approximation that GPT-2 was trained with
        self.projection = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""
        return self.projection(self.activation(self.expansion(x)))


class Block(nn.Module):
    """Attention and a feed-forward network, each preceded by a layer norm and added to the residual stream.

    The arguments are fields of `models.decoder.DecoderConfig`.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        bias: bool = True,
        attention: Literal["fused", "explicit"] = "fused",
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(n_embd, LAYER_NORM_EPSILON, bias=bias)
        self.attention = MultiHeadAttention(n_embd, n_head, attention_dropout, bias, attention)
        self.feed_forward_norm = nn.LayerNorm(n_embd, LAYER_NORM_EPSILON, bias=bias)
        self.feed_forward = FeedForward(n_embd, bias)
        self.residual_dropout = nn.Dropout(residual_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Apply the block: (B, T, C) -> (B, T, C); for mask and cache see `MultiHeadAttention.forward`."""
        x = x + self.residual_dropout(self.attention(self.attention_norm(x), mask, cache))
        return x + self.residual_dropout(self.feed_forward(self.feed_forward_norm(x)))
