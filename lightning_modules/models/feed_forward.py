"""Feed-forward networks: two layers with a nonlinearity φ between them, the same at every position.

    FeedForward(x) = W_2 φ(W_1 x + b_1) + b_2

| name   | φ                                 | W_1                        | paper                       |
|--------|-----------------------------------|----------------------------|-----------------------------|
| gelu   | GELU(h), by its tanh formula      | C -> 4C                    | Hendrycks and Gimpel (2016) |
| relu2  | max(0, h)²                        | C -> 4C                    | So et al. (2021)            |
| swiglu | SiLU(g) · u, with (g, u) = W_1 x  | C -> two parts of 8/3 C    | Shazeer (2020)              |

SiLU(g) = g / (1 + e^-g). SwiGLU has three matrices, W_1 with its two parts and W_2; a hidden layer of 8/3 C instead of
4C makes the number of weights the same. ReLU² is the cheapest of the three, and most of its hidden units are 0.

Papers: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), https://arxiv.org/abs/1606.08415; So et al.,
"Primer: Searching for Efficient Transformers for Language Modeling" (2021), https://arxiv.org/abs/2109.08668; Shazeer,
"GLU Variants Improve Transformer" (2020), https://arxiv.org/abs/2002.05202.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FeedForwardName = Literal["gelu", "relu2", "swiglu"]


class GELU(nn.GELU):
    """GELU by the tanh formula, which GPT-2 was trained with: (..., H) to (..., H)."""

    n_parts = 1

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class ReLU2(nn.Module):
    """The square of the rectifier: (..., H) to (..., H)."""

    n_parts = 1

    def forward(self, h: Tensor) -> Tensor:
        """Return max(0, h)²."""
        return F.relu(h).square()


class SwiGLU(nn.Module):
    """A linear layer gated by another one: (..., 2H) to (..., H)."""

    n_parts = 2

    def forward(self, h: Tensor) -> Tensor:
        """Return SiLU(g) · u for h = (g, u)."""
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up


ACTIVATIONS: dict[str, type[GELU | ReLU2 | SwiGLU]] = {"gelu": GELU, "relu2": ReLU2, "swiglu": SwiGLU}


class FeedForward(nn.Module):
    """Two linear layers with a nonlinearity between them.

    Args:
        n_embd: Width C of the input and the output.
        bias: Whether the linear layers have biases.
        name: Nonlinearity: `gelu`, `relu2` or `swiglu`.
    """

    def __init__(self, n_embd: int, bias: bool = True, name: FeedForwardName = "gelu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[name]()
        width = 4 * n_embd if self.activation.n_parts == 1 else swiglu_width(n_embd)
        self.expansion = nn.Linear(n_embd, self.activation.n_parts * width, bias=bias)
        self.stacked_rows = {"expansion": [width] * self.activation.n_parts}  # rows of each matrix
        self.projection = nn.Linear(width, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position: (B, T, C) -> (B, T, hidden) -> (B, T, C)."""
        h = self.expansion(x)
        # A compiled backward pass reads h for the gradient of φ anyway; keeping φ(h) as well would take as much memory
        # again as h, the largest tensor of a block, and save next to no time.
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            return self.projection(checkpoint(self.activation, h, use_reentrant=False))
        return self.projection(self.activation(h))


def swiglu_width(n_embd: int) -> int:
    """Return the width of the hidden layer of SwiGLU: 8/3 C, rounded up to a multiple of 8 for matrix units."""
    return -(-8 * n_embd // 24) * 8
