"""The decoder: token and position embeddings, a stack of blocks, and a score for every next token (notebook 3.4).

    x_0 = Dropout(E[token] + P[position])          E: V x C,  P: block_size x C
    x_l = Block_l(x_{l-1})                         l = 1 ... n_layer
    logits = LayerNorm(x_{n_layer}) Eᵀ             softmax(logits[t]) predicts token t + 1

The same matrix E reads tokens in and scores them at the end (tied embeddings): tokens used alike get rows alike in
both places, and a small model saves a good part of its parameters.

Papers: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019); Press and Wolf, "Using the
Output Embedding to Improve Language Models" (2017), https://arxiv.org/abs/1608.05859.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.attention import KeyValueCache, causal_mask
from lightning_modules.models.block import LAYER_NORM_EPSILON, Block


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Args:
        vocab_size: Number of tokens V.
        block_size: Context length: the most positions that the decoder can look at.
        n_layer: Number of blocks.
        n_head: Attention heads a block; divides n_embd.
        n_embd: Width C of embeddings and residual stream.
        embedding_dropout: Share of the embeddings' sum dropped in training, in [0, 1).
        attention_dropout: Share of attention weights dropped in training, in [0, 1).
        residual_dropout: Share of what each half of a block adds dropped in training, in [0, 1).
        bias: Whether linear layers and layer norms have a bias.
        attention: "fused" for torch's kernels, "explicit" for the formula written out; they compute the same.

    Raises:
        ValueError: A size below 1, n_embd not divisible by n_head, a dropout outside [0, 1), an unknown attention.
    """

    vocab_size: int
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    bias: bool = True
    attention: Literal["fused", "explicit"] = "fused"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1)")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.attention not in ("fused", "explicit"):
            raise ValueError(f"attention={self.attention!r}: choose 'fused' or 'explicit'")


class Decoder(nn.Module):
    """GPT-2's decoder.

    Its weights are torch's defaults until a function of `initialization` or a checkpoint gives it better ones.

    Args:
        config: Its shape.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(
            Block(
                config.n_embd,
                config.n_head,
                config.attention_dropout,
                config.residual_dropout,
                config.bias,
                config.attention,
            )
            for _ in range(config.n_layer)
        )
        self.final_norm = nn.LayerNorm(config.n_embd, LAYER_NORM_EPSILON, bias=config.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Score every token of the vocabulary as the next one, at every position.

        Args:
            input_ids: (B, T) int64. With a cache, only the tokens that it has not seen.
            attention_mask: (B, S) with 0 at padding, over the cached positions and the T new ones. The logits at
                padding mean nothing. None: no padding (nor is a mask needed for padding on the right, since real
                tokens never look there).
            position_ids: (B, T) int64, in [0, block_size). None: counted from the start of the row, which for padding
                on the left is not what a trained model expects.
            cache: From `new_cache`; grows by T positions.
            last_only: Score the last position alone, as generation needs.

        Returns:
            logits (B, T, V), or (B, 1, V) where last_only.

        Raises:
            ValueError: The sequence, cached part included, is longer than the context.
        """
        T = input_ids.size(1)  # noqa: N806
        past = cache[0].length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(
                f"a sequence of {past + T} tokens is longer than the context: block_size={self.config.block_size}"
            )
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)  # (T,), the same for every row
        mask = None if attention_mask is None else _padding_and_causal_mask(attention_mask, T)

        x = self.token_embedding(input_ids) + self.position_embedding(position_ids)  # (B, T, C)
        x = self.embedding_dropout(x)
        for block, layer_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, mask, layer_cache)
        if last_only:
            x = x[:, -1:]
        return F.linear(self.final_norm(x), self.token_embedding.weight)  # (B, T, C) @ (C, V)

    def new_cache(self) -> list[KeyValueCache]:
        """An empty cache for each block; it takes memory when it is first written to."""
        return [KeyValueCache(self.config.block_size) for _ in self.blocks]

    def num_parameters(self, embedding: bool = True) -> int:
        """Number of weights, with or without the token and position embeddings; tied weights count once."""
        tables = 0 if embedding else self.token_embedding.weight.numel() + self.position_embedding.weight.numel()
        return sum(parameter.numel() for parameter in self.parameters()) - tables

    def flops_per_token(self) -> int:
        """Floating-point operations that training needs for one token of a full context, forward and backward.

        6 N + 12 L C T (Chowdhery et al., "PaLM", 2022, appendix B, https://arxiv.org/abs/2204.02311): a weight costs a
        multiplication and an addition forward and twice as many backward; the second term is Q Kᵀ and its product with
        V, causal or not. N holds the token embedding, which is the output matrix too, and not the positions, which
        are only looked up.
        """
        config = self.config
        n_multiplied = self.num_parameters() - self.position_embedding.weight.numel()
        return 6 * n_multiplied + 12 * config.n_layer * config.n_embd * config.block_size


def _padding_and_causal_mask(attention_mask: Tensor, n_query: int) -> Tensor:
    """(B, S) of 0 and 1, the last `n_query` of which ask -> (B, 1, T, S) bool, the same for every head."""
    n_key = attention_mask.size(1)
    causal = causal_mask(n_query, n_key, attention_mask.device)  # (T, S)
    # Padding looks at itself: nobody reads what it finds, but a row without a single key would be softmax of nothing.
    itself = causal.triu(n_key - n_query)
    return (causal & attention_mask.bool()[:, None, None, :]) | itself
