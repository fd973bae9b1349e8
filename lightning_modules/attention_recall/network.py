"""A decoder from which any part can be left out, to show the effect of each part.

    x = E[token] + P[position]
    x = x + Attention(Norm(x))        n_layer
    x = x + FeedForward(Norm(x))      times
    logits = W Norm(x) + b

With all parts it is the decoder of `models/decoder.py`, except that its output layer has a bias, and a matrix W that is
not the embedding matrix. With n_layer = n_head = 1 and without residual, norm and feed-forward network, it is one
attention head between an embedding and an output.

The initial weights meet the assumption of the factor 1/√d (see `models/attention.py`): every linear layer is
N(0, 1 / fan_in) and every embedding N(0, 1), so normalised inputs give queries and keys of variance 1, and dot products
of variance d.
With the small initial weights of GPT-2 the scores are near 0, whether they are scaled or not.
"""

from collections.abc import Collection
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_modules.models.attention import MultiHeadAttention
from lightning_modules.models.feed_forward import FeedForward
from lightning_modules.models.norms import LAYER_NORM_EPSILON

Part = Literal["scale", "mask", "positions", "residual", "norm", "feed_forward"]


class PartialBlock(nn.Module):
    """The block of `models/block.py`, whole or with parts left out, as in `AttentionNetwork`."""

    def __init__(self, n_embd: int, n_head: int, without: Collection[Part] = ()) -> None:
        super().__init__()
        self.residual = "residual" not in without
        self.attention_norm = layer_norm(n_embd, without)
        self.attention = MultiHeadAttention(n_embd, n_head, scale=1.0 if "scale" in without else None)
        if "feed_forward" in without:
            self.feed_forward = None
        else:
            self.feed_forward_norm = layer_norm(n_embd, without)
            self.feed_forward = FeedForward(n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the stream after the block: (B, T, C) to (B, T, C); the mask is that of `MultiHeadAttention`."""
        x = self._add(x, self.attention(self.attention_norm(x), mask))
        if self.feed_forward is not None:
            x = self._add(x, self.feed_forward(self.feed_forward_norm(x)))
        return x

    def _add(self, x: Tensor, result: Tensor) -> Tensor:
        return x + result if self.residual else result


class AttentionNetwork(nn.Module):
    """Embeddings, a stack of blocks, and an output layer that gives a score to every token at every position.

    Args:
        vocab_size: Number of tokens V.
        block_size: Largest number of positions in a sequence.
        n_layer: Number of blocks.
        n_head: Number of attention heads of a block; divides `n_embd`.
        n_embd: Width C of the residual stream.
        without: Parts to leave out, see `AttentionRecallModule`.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        n_layer: int = 2,
        n_head: int = 1,
        n_embd: int = 64,
        without: Collection[Part] = (),
    ) -> None:
        super().__init__()
        if unknown := sorted(set(without) - set(get_args(Part))):
            raise ValueError(f"without={unknown}: there are {', '.join(get_args(Part))}")
        self.causal = "mask" not in without
        self.token_embedding = nn.Embedding(vocab_size, n_embd)
        self.position_embedding = None if "positions" in without else nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(PartialBlock(n_embd, n_head, without) for _ in range(n_layer))
        self.final_norm = layer_norm(n_embd, without)
        self.output = nn.Linear(n_embd, vocab_size)
        self.initialize()

    def initialize(self) -> None:
        """Draw all weights: linear layers N(0, 1 / fan_in), biases 0, embeddings N(0, 1), norms 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding | nn.LayerNorm):
                module.reset_parameters()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the scores of every token at every position: (B, T) int64 to (B, T, V)."""
        T = input_ids.size(1)  # noqa: N806
        x = self.token_embedding(input_ids)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[:T]
        everywhere = torch.ones(T, T, dtype=torch.bool, device=input_ids.device)
        for block in self.blocks:
            x = block(x, None if self.causal else everywhere)
        return self.output(self.final_norm(x))


def layer_norm(n_embd: int, without: Collection[Part]) -> nn.Module:
    """Return a layer norm over C features, or the identity if `norm` is left out."""
    return nn.Identity() if "norm" in without else nn.LayerNorm(n_embd, LAYER_NORM_EPSILON)
