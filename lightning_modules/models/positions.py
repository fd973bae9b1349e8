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

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # the decoder imports this file
    from lightning_modules.models.decoder import DecoderConfig

PositionsName = Literal["learned", "rotary"]
Rotation = tuple[Tensor, Tensor]  # cos and sin of the angles, each (T, D/2) or (B, 1, T, D/2) float32

ROTARY_BASE = 10_000.0


class LearnedPositions(nn.Embedding):
    """A table of one vector for each position.

    Args:
        config: Sizes and options of the decoder; the table is `block_size` × `n_embd`.
    """

    def __init__(self, config: "DecoderConfig") -> None:
        super().__init__(config.block_size, config.n_embd)

    def add_to(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Add the vectors of the positions, (T,) or (B, T), to the embeddings, (B, T, C)."""
        return x + self(position_ids)

    def rotation(self, position_ids: Tensor) -> Rotation | None:
        """Return `None`: queries and keys are not rotated."""
        return None


class RotaryPositions(nn.Module):
    """Angles by which queries and keys are rotated; there are no weights.

    Args:
        config: Sizes and options of the decoder; `head_dim` and `rotary_base` give the angles.
    """

    def __init__(self, config: "DecoderConfig") -> None:
        super().__init__()
        self.head_dim = config.head_dim  # D
        self.base = config.rotary_base  # b

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
