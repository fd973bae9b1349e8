"""Value embeddings: every attention layer also reads the token itself, past all layers below.

    v_l = W_V,l x_l + λ_l U[token]          U: V x (H_kv D), one table for all layers; λ_l a weight, 0.5 at the start

Deep layers average over tokens that earlier layers have mixed. Zhou et al. (2024) add the values of the first layer to
those of each layer, which keeps the tokens apart: this one residual connection approximates attention across all layers
at little cost. With rotary positions, the input of the first layer is a function of the token alone, so its values are
rows of a table. Here the table is a weight of its own, as in the speedruns of nanoGPT: no layer waits for another, and
a cache has nothing more to hold.

Paper: Zhou et al., "Value Residual Learning" (2024), https://arxiv.org/abs/2410.17897.
"""

import torch
from torch import Tensor, nn


class ValueMix(nn.Module):
    """The weight λ with which a layer adds the value embeddings of the tokens to its values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 0.5."""
        nn.init.constant_(self.weight, 0.5)

    def forward(self, value: Tensor, token_values: Tensor) -> Tensor:
        """Return v + λ u: (B, H_kv, T, D) and (B, T, H_kv D) to (B, H_kv, T, D)."""
        return value + self.weight * token_values.unflatten(-1, (value.size(1), -1)).transpose(1, 2)
