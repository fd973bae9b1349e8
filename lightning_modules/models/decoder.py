"""The decoder: token and position embeddings, a stack of blocks, and scores of the next token.

    x_0 = Dropout(E[token] + P[position])          E: V x C,  P: block_size x C
    x_l = Block_l(x_{l-1})                         l = 1 ... n_layer
    logits = Norm(x_{n_layer}) Wᵀ                  softmax(logits[t]) predicts token t + 1

In GPT-2, the matrix E both embeds the input tokens and scores the output tokens (tied embeddings, W = E). Tokens of
similar use need similar rows in both places, and tying saves a large part of the parameters of a small model. A model
with many more weights than the table learns better with a matrix W of its own.

The parts of a decoder have names in its configuration; the defaults are those of GPT-2. Later decoders have rotary
positions (`positions.py`), RMSNorm (`norms.py`), other feed-forward networks (`feed_forward.py`), fewer heads of keys
and values, normalised queries and keys (`attention.py`), value embeddings (`value_embedding.py`), a norm after the
embedding, and a soft cap on the logits, which keeps them within (-cap, cap):

    logits = cap tanh(logits / cap)

Papers: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019); Press and Wolf, "Using the
Output Embedding to Improve Language Models" (2017), https://arxiv.org/abs/1608.05859; Bello et al., "Neural
Combinatorial Optimization with Reinforcement Learning" (2017), https://arxiv.org/abs/1611.09940, and Gemma Team, "Gemma
2" (2024), https://arxiv.org/abs/2408.00118 (soft cap).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.attention import causal_mask
from lightning_modules.models.block import Block
from lightning_modules.models.cache import KeyValueCache
from lightning_modules.models.feed_forward import ACTIVATIONS, FeedForwardName
from lightning_modules.models.norms import NORMS, NormName
from lightning_modules.models.positions import POSITIONS, ROTARY_BASE, PositionsName

_PARTS: dict[str, Collection[str]] = {
    "attention": ("fused", "explicit"),
    "positions": POSITIONS,
    "norm": NORMS,
    "feed_forward": ACTIVATIONS,
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder.

    Args:
        vocab_size: Number of tokens V.
        block_size: Context length: the largest number of positions in a sequence.
        n_layer: Number of blocks.
        n_head: Number of attention heads in a block; divides `n_embd`.
        n_embd: Width C of the embeddings and the residual stream.
        embedding_dropout: Probability of dropping a value of the summed embeddings in training, in [0, 1).
        attention_dropout: Probability of dropping an attention weight in training, in [0, 1).
        residual_dropout: Probability of dropping a value that half a block adds to the stream in training, in [0, 1).
        bias: Whether linear layers and layer norms have biases.
        attention: `fused` (torch's kernels) or `explicit` (each step of the formula); both compute the same function.
        n_kv_head: Number of heads of keys and values; divides `n_head`. `None` means `n_head`.
        positions: `learned` or `rotary`.
        norm: `layer`, `rms` or `rms_unweighted`.
        feed_forward: `gelu`, `relu2` or `swiglu`.
        qk_norm: Whether queries and keys are normalised.
        embedding_norm: Whether the embeddings are normalised before the first block.
        value_embeddings: Whether every block adds an embedding of the token to its values.
        tied_embeddings: Whether the output matrix is the token embedding.
        logit_soft_cap: Bound of the absolute values of the logits, above 0. `None` means no bound.
        norm_eps: The ε of the norms, above 0; that of QK-norm is fixed. `None` means 1e-5 for `layer` and 1e-6 for the
            others.
        rotary_base: Base of the angles of rotary positions, above 0.

    Raises:
        ValueError: If a size is below 1, `n_head` does not divide `n_embd`, `n_kv_head` does not divide `n_head`, the
            heads of rotary positions have an odd width, a dropout is outside [0, 1), the soft cap, the ε or the base is
            not above 0, or a name is unknown.
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
    n_kv_head: int | None = None
    positions: PositionsName = "learned"
    norm: NormName = "layer"
    feed_forward: FeedForwardName = "gelu"
    qk_norm: bool = False
    embedding_norm: bool = False
    value_embeddings: bool = False
    tied_embeddings: bool = True
    logit_soft_cap: float | None = None
    norm_eps: float | None = None
    rotary_base: float = ROTARY_BASE

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1)")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(f"n_kv_head={self.n_kv_head}: must divide n_head={self.n_head}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"positions=rotary needs heads of an even width, and n_embd / n_head is {self.head_dim}")
        if self.logit_soft_cap is not None and not self.logit_soft_cap > 0:
            raise ValueError(f"logit_soft_cap={self.logit_soft_cap}: must be above 0, or None for no bound")
        for name in ("norm_eps", "rotary_base"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for name, choices in _PARTS.items():
            if getattr(self, name) not in choices:
                names = " or ".join(map(repr, choices))
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {names}")

    @property
    def head_dim(self) -> int:
        """Number of features of an attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_width(self) -> int:
        """Number of features of the keys of all heads."""
        return (self.n_kv_head or self.n_head) * self.head_dim


class Decoder(nn.Module):
    """The decoder of GPT-2, or one of other parts.

    The layers initialise their weights by torch's defaults. Apply a function of `initialization` or load a checkpoint.

    Args:
        config: Sizes and options.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = POSITIONS[config.positions](config)
        self.value_embedding = nn.Embedding(config.vocab_size, config.kv_width) if config.value_embeddings else None
        norm = partial(NORMS[config.norm], config.n_embd, config.bias, config.norm_eps)
        self.embedding_norm = norm() if config.embedding_norm else nn.Identity()
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = norm()
        self.output = None if config.tied_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Return the scores of the next token at each position.

        Args:
            input_ids: Token ids, (B, T) int64; see `hidden_states` for this and the next three.
            attention_mask: (B, S), 0 at padding, whose logits are meaningless, and 1 elsewhere.
            position_ids: Positions of the tokens, (B, T) int64.
            cache: Result of `new_cache`.
            last_only: Whether to score only the last position, as generation needs.

        Returns:
            Logits, (B, T, V), or (B, 1, V) if `last_only`.
        """
        x = self.hidden_states(input_ids, attention_mask, position_ids, cache)  # (B, T, C)
        if last_only:
            x = x[:, -1:]
        return soft_capped(F.linear(x, self.output_weight), self.config.logit_soft_cap)  # (B, T, C) @ (C, V)

    @property
    def output_weight(self) -> Tensor:
        """The output matrix, (V, C): the token embedding, or a matrix of its own."""
        return self.token_embedding.weight if self.output is None else self.output.weight

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """Return the states whose products with the output matrix are the logits, before the soft cap.

        A loss over a large vocabulary computes those products itself, see `linear_cross_entropy`.

        Args:
            input_ids: Token ids, (B, T) int64; with a cache, only the tokens that follow the cached ones.
            attention_mask: (B, S), 0 at padding and 1 elsewhere, for the cached positions and the T new ones. States at
                padding are meaningless. `None` means no padding. Padding on the right needs no mask, because no token
                attends to later positions. Or the whole mask, (B, 1, T, S), as in `MultiHeadAttention.forward`.
            position_ids: (B, T) int64, in [0, block_size). `None` counts from the start of the row; with padding on the
                left, pass positions that count from the first token.
            cache: Result of `new_cache`; the T positions are appended.

        Returns:
            Output of the final norm, (B, T, C).

        Raises:
            ValueError: If the sequence with its cached part is longer than the context.
        """
        T = input_ids.size(1)  # noqa: N806
        past = cache[0].length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(
                f"a sequence of {past + T} tokens is longer than the context: block_size={self.config.block_size}"
            )
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)  # (T,), the same for every row
        mask = attention_mask
        if mask is not None and mask.dim() == 2:
            mask = _padding_and_causal_mask(mask, T)

        x = self.position_embedding.add_to(self.token_embedding(input_ids), position_ids)  # (B, T, C)
        x = self.embedding_dropout(self.embedding_norm(x))
        rotation = self.position_embedding.rotation(position_ids)
        token_values = None if self.value_embedding is None else self.value_embedding(input_ids)  # (B, T, H_kv D)
        caches: Sequence[KeyValueCache | None] = cache or [None] * len(self.blocks)
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            x = block(x, mask, layer_cache, rotation, token_values)
        return self.final_norm(x)

    def new_cache(self, max_length: int | None = None) -> list[KeyValueCache]:
        """Return an empty cache for each block, of at most `max_length` positions; by default for the whole context.

        The first update of a cache allocates its memory.
        """
        return [KeyValueCache(max_length or self.config.block_size) for _ in self.blocks]

    def num_parameters(self) -> int:
        """Return the number of weights; tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Return the floating-point operations of a forward and backward pass for one token of a full context.

        The formula is 6 N + 12 L C T (Chowdhery et al., "PaLM", 2022, appendix B, https://arxiv.org/abs/2204.02311).
        Each weight costs a multiplication and an addition in the forward pass, and twice as many in the backward pass.
        The second term is Q Kᵀ and the product of the weights with V, without a saving for causality. N is the number
        of weights that multiply: a token embedding that is the output matrix too counts, tables that are only looked up
        do not.
        """
        config = self.config
        tables = (module.weight for module in self.modules() if isinstance(module, nn.Embedding))
        looked_up = sum(table.numel() for table in tables if table is not self.output_weight)
        return 6 * (self.num_parameters() - looked_up) + 12 * config.n_layer * config.n_embd * config.block_size


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap tanh(logits / cap), or the logits as they are if there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _padding_and_causal_mask(attention_mask: Tensor, n_query: int) -> Tensor:
    """Return the mask of causal attention without padding, (B, 1, T, S), from a padding mask (B, S) of 0 and 1."""
    n_key = attention_mask.size(1)
    causal = causal_mask(n_query, n_key, attention_mask.device)  # (T, S)
    # Padding attends to itself. No token reads the result, but softmax over a row without any key would be NaN.
    itself = causal.triu(n_key - n_query)
    return (causal & attention_mask.bool()[:, None, None, :]) | itself
