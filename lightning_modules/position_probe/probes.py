"""Probes: learned functions that predict targets from two rows of a position matrix.

A probe reads the rows x_i and x_j of two positions and predicts one of four targets:

    linear      y = a · x_i + b · x_j + c
    bilinear    y = a · x_i + b · x_j + c + Σ_r (u_r · x_i) (v_r · x_j)          r = 1 ... width
    mlp         y = w · relu(A x_i + B x_j + c) + e                              width hidden units

Many probes train at once, in one stack of matrices: one for each table of rows, fold and target. They share no
parameter, so a stack learns exactly what its probes would learn one by one, in a few large products.

Papers: Alain and Bengio, "Understanding Intermediate Layers Using Linear Classifier Probes" (2016),
https://arxiv.org/abs/1610.01644; Hewitt and Liang, "Designing and Interpreting Probes with Control Tasks" (2019),
https://arxiv.org/abs/1909.03368; Wang and Chen, "What Do Position Embeddings Learn?" (2020),
https://arxiv.org/abs/2010.04903.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("position", "order", "signed_distance", "distance")
ORDER = TARGETS.index("order")  # the only target that is a class


def targets_of(first: Tensor, second: Tensor) -> Tensor:
    """Return `TARGETS` of positions i and j (...): i, whether i < j, j - i and |j - i|, (..., 4) float32."""
    difference = second - first
    return torch.stack([first, difference > 0, difference, difference.abs()], dim=-1).float()


def standardized(rows: Tensor, seen: Tensor) -> Tensor:
    """Return rows (T, d) with mean 0 and variance 1 in each component over the rows that a probe trains on, (T,) bool.

    All are then divided by one number, so that the largest singular value of these n rows is √n. The loss of a linear
    probe then has the same curvature in its steepest direction for every table, and one learning rate suits a table and
    all of its controls. Principal directions keep their relative size: gradient descent from zero first finds those of
    large variance, along which neighbouring rows are similar.
    """
    known = rows[seen].double()
    deviation = known.std(dim=0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    x = (rows.double() - known.mean(dim=0)) / scale
    return (x / torch.linalg.matrix_norm(x[seen], 2) * len(known) ** 0.5).float()


class LinearProbes(nn.Module):
    """Probes y = a · x_i + b · x_j + c for a stack of G tables of rows (T, d) and K targets.

    `width` is the rank W of the bilinear form, or the hidden units of the mlp; it is unused by the linear probe.
    """

    def __init__(self, n_tables: int, n_embd: int, n_targets: int, width: int = 0) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(n_tables, n_embd, n_targets))
        self.second = nn.Parameter(torch.zeros(n_tables, n_embd, n_targets))
        self.bias = nn.Parameter(torch.zeros(n_tables * n_targets))  # a vector, so that it does not decay

    def forward(self, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return the predictions (G, B, K) for the pairs of positions i (B,) and j (B,) in the tables (G, T, d)."""
        bias = self.bias.view(len(rows), 1, -1)  # (G, 1, K)
        return _of_pairs(rows, self.first, first) + _of_pairs(rows, self.second, second) + bias


class BilinearProbes(LinearProbes):
    """Linear probes plus a bilinear form of low rank, Σ_r (u_r · x_i) (v_r · x_j); see `LinearProbes`."""

    def __init__(self, n_tables: int, n_embd: int, n_targets: int, width: int) -> None:
        super().__init__(n_tables, n_embd, n_targets)
        std = (n_embd**2 * width) ** -0.25  # the form has the variance of a product of two unit projections
        self.first_factor = nn.Parameter(torch.randn(n_tables, n_embd, n_targets * width) * std)
        self.second_factor = nn.Parameter(torch.randn(n_tables, n_embd, n_targets * width) * std)

    def forward(self, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return the predictions, (G, B, K); see `LinearProbes.forward`."""
        product = _of_pairs(rows, self.first_factor, first) * _of_pairs(rows, self.second_factor, second)
        linear = super().forward(rows, first, second)
        return linear + product.view(*linear.shape, -1).sum(dim=-1)  # (G, B, K, W) -> (G, B, K)


class MLPProbes(nn.Module):
    """Probes y = w · relu(A x_i + B x_j + c) + e; see `LinearProbes`."""

    def __init__(self, n_tables: int, n_embd: int, n_targets: int, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(n_tables, n_embd, n_targets * width) * (2 * n_embd) ** -0.5)
        self.second = nn.Parameter(torch.randn(n_tables, n_embd, n_targets * width) * (2 * n_embd) ** -0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(n_tables * n_targets * width))
        self.readout = nn.Parameter(torch.randn(n_tables, n_targets, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_tables * n_targets))

    def forward(self, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return the predictions, (G, B, K); see `LinearProbes.forward`."""
        n_tables, n_targets, width = self.readout.shape
        hidden = _of_pairs(rows, self.first, first) + _of_pairs(rows, self.second, second)
        hidden = F.relu(hidden + self.hidden_bias.view(n_tables, 1, -1))  # (G, B, K W)
        hidden = hidden.view(n_tables, -1, n_targets, width)
        outputs = torch.einsum("gbkw,gkw->gbk", hidden, self.readout)
        return outputs + self.bias.view(n_tables, 1, -1)


PROBES: dict[str, type[nn.Module]] = {"linear": LinearProbes, "bilinear": BilinearProbes, "mlp": MLPProbes}


def _of_pairs(rows: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Return x_i · w at these positions, (G, B, H), for rows (G, T, d) and weights (G, d, H)."""
    # Positions repeat in a batch, so the product is taken once for each position rather than for each pair.
    return (rows @ weight).index_select(1, positions)
