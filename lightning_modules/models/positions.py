r"""Positions: what tells attention the order of the tokens.

Learned positions are a table P with one vector for each position, added to the embedding of the token.

Rotary positions rotate queries and keys instead. A head of D features is D/2 pairs (x_i, x_{i + D/2}); pair i of
position t turns by the angle t ω_i:

    R_t x = (x_1 cos tω - x_2 sin tω, x_2 cos tω + x_1 sin tω)      x_1, x_2: halves of x
    ω_i   = b^(-2i / D), b = 10,000 by default                      i = 0 ... D/2 - 1

    (R_t q) · (R_s k) = q · R_{s-t} k

The score of a query and a key then depends on the distance of their positions only. The fast pairs resolve neighbours,
the slow ones distances of thousands of tokens. Rotary positions have no weights, and any number of positions.

Papers: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019); Su et al., "RoFormer:
Enhanced Transformer with Rotary Position Embedding" (2021), https://arxiv.org/abs/2104.09864. Su et al. pair neighbours
(x_{2i}, x_{2i+1}); the halves here are the convention of Llama, the same up to the order of the features.
"""

from typing import Literal

import torch
from torch import Tensor, nn

PositionsName = Literal["learned", "rotary"]
Rotation = tuple[Tensor, Tensor]  # cos and sin of the angles, each (T, D/2) or (B, 1, T, D/2) float32

ROTARY_BASE = 10_000.0


class LearnedPositions(nn.Embedding):
    """A table of one vector for each position.

    Args:
        block_size: Number of positions.
        n_embd: Width C of the vectors.
        head_dim: Features of an attention head; not used.
        base: Base of the angles; not used.
    """

    def __init__(self, block_size: int, n_embd: int, head_dim: int, base: float = ROTARY_BASE) -> None:
        super().__init__(block_size, n_embd)

    def add_to(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Add the vectors of the positions, (T,) or (B, T), to the embeddings, (B, T, C)."""
        return x + self(position_ids)

    def rotation(self, position_ids: Tensor) -> Rotation | None:
        """Return `None`: queries and keys are not rotated."""
        return None


class RotaryPositions(nn.Module):
    """Angles by which queries and keys are rotated; there are no weights.

    Args:
        block_size: Number of positions; not used.
        n_embd: Width of the residual stream; not used.
        head_dim: Features D of an attention head, an even number.
        base: Base b of the angles.

    Raises:
        ValueError: If `head_dim` is odd.
    """

    def __init__(self, block_size: int, n_embd: int, head_dim: int, base: float = ROTARY_BASE) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"positions: rotary needs heads of an even width, and n_embd / n_head is {head_dim}")
        self.head_dim = head_dim
        self.base = base

    def add_to(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Return the embeddings as they are."""
        return x

    def rotation(self, position_ids: Tensor) -> Rotation | None:
        """Return the cosines and sines for positions (T,) or (B, T)."""
        # Computed each time: a buffer would be lost when the decoder moves from the meta device.
        pairs = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32)  # 2i
        angles = position_ids[..., None].float() * self.base ** (-pairs / self.head_dim)  # (..., T, D/2)
        if angles.dim() == 3:
            angles = angles[:, None]  # (B, 1, T, D/2): the same for every head
        return angles.cos(), angles.sin()


POSITIONS: dict[str, type[LearnedPositions | RotaryPositions]] = {
    "learned": LearnedPositions,
    "rotary": RotaryPositions,
}


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys, (B, H, T, D), by the angles of their positions."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
