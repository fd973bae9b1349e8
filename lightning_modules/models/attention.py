r"""Attention: each position computes a weighted mean of the values of all positions.

Each position has a query q, a key k and a value v. The dot product of the query of one position and the key of another
scores how relevant the second is to the first. Softmax turns the scores of a query into weights that sum to 1, and the
output is the weighted mean of the values:

    Attention(Q, K, V) = softmax(Q Kᵀ / √d) V

The dot product of two random vectors of length d and unit variance has variance d. Division by √d brings the variance
back to 1, where softmax does not yet give all the weight to one position. Multi-head attention computes n_head such
means in parallel, each head in n_embd / n_head dimensions of its own, and mixes the outputs of the heads with one more
matrix:

    MultiHead(x) = Concat(head_1, ..., head_h) W_O,    head_i = Attention(x W_Q,i, x W_K,i, x W_V,i)

In a decoder, a position attends only to itself and to earlier positions (causal attention); a mask excludes the others.

Two changes were found later. In grouped-query attention, H / H_kv heads share the keys and values of one, so that a
cache holds H_kv heads in place of H (H_kv = 1 is multi-query attention). With QK-norm, queries and keys have a fixed
length, so a score is √d times a cosine and cannot grow during training:

    Attention(Q, K, V) = softmax(RMSNorm(Q) RMSNorm(K)ᵀ / √d) V        scores = √d cos(q, k)

Papers: Vaswani et al., "Attention Is All You Need" (2017), sections 3.2.1 and 3.2.2, https://arxiv.org/abs/1706.03762;
Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models" (2023), https://arxiv.org/abs/2305.13245;
Henry et al., "Query-Key Normalization for Transformers" (2020), https://arxiv.org/abs/2010.04245.

Shapes: B batch size, T number of queries, S number of keys (T plus the positions in a cache), C = n_embd, H = n_head,
H_kv = n_kv_head, D = C / H.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.cache import KeyValueCache
from lightning_modules.models.norms import rms_unweighted
from lightning_modules.models.positions import Rotation, rotate
from lightning_modules.models.value_embedding import ValueMix


def causal_mask(n_query: int, n_key: int, device: torch.device | None = None) -> Tensor:
    """Return the mask of causal attention, in which the T queries are the last of the S positions.

    The mask is (T, S) bool, true where query t attends to key s: s <= t + (S - T).
    """
    return torch.ones(n_query, n_key, dtype=torch.bool, device=device).tril(n_key - n_query)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention with one line for each step of the formula.

    Args:
        query: Queries, (..., T, D).
        key: Keys, (..., S, D).
        value: Values, (..., S, D).
        mask: Bool, broadcastable to (..., T, S), true where the query attends to the key: at least one key for each
            query, because softmax over no scores is NaN. Or float, added to the scores. `None` means everywhere.
        dropout_p: Probability of dropping a weight, in [0, 1); pass 0 outside training.
        scale: Factor on the dot products; `None` means 1 / √D.

    Returns:
        The output, (..., T, D), and the weights before dropout, (..., T, S), which sum to 1 over S.
    """
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale  # (..., T, D) @ (..., D, S) -> (..., T, S)
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)  # e^-inf = 0
    weights = scores.softmax(dim=-1)  # (..., T, S)
    output = F.dropout(weights, dropout_p) @ value  # (..., T, S) @ (..., S, D) -> (..., T, D)
    return output, weights


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention.

    Args:
        n_embd: Width C of the input and the output.
        n_head: Number of heads H; divides `n_embd`.
        dropout: Probability of dropping an attention weight in training, in [0, 1).
        bias: Whether the linear layers have biases.
        implementation: `fused` calls torch's kernels (flash attention, or cuDNN's, if the device has it), which never
            store the (T, S) weights; `explicit` calls `scaled_dot_product_attention` above. Both compute the same
            function.
        scale: Factor on the dot products; `None` means 1 / √D.
        n_kv_head: Number of heads H_kv of keys and values; divides `n_head`. `None` means `n_head`.
        qk_norm: Whether queries and keys are normalised, each head by itself.
        value_embeddings: Whether the values of a position include an embedding of its token.

    Raises:
        ValueError: If `n_head` does not divide `n_embd`, `n_kv_head` does not divide `n_head`, or the implementation is
            unknown.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        dropout: float = 0.0,
        bias: bool = True,
        implementation: Literal["fused", "explicit"] = "fused",
        scale: float | None = None,
        n_kv_head: int | None = None,
        qk_norm: bool = False,
        value_embeddings: bool = False,
    ) -> None:
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd={n_embd} is not divisible by n_head={n_head}: each head gets n_embd / n_head")
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_head % n_kv_head:
            raise ValueError(f"n_head={n_head} is not divisible by n_kv_head={n_kv_head}: groups of heads share a key")
        if implementation not in ("fused", "explicit"):
            raise ValueError(f"attention implementation {implementation!r}: choose 'fused' or 'explicit'")
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.head_dim = n_embd // n_head
        self.dropout = dropout
        self.implementation = implementation
        self.scale = scale
        # W_Q, W_K and W_V of all heads in one matrix product
        self.qkv = nn.Linear(n_embd, (n_head + 2 * n_kv_head) * self.head_dim, bias=bias)
        self.stacked_rows = {"qkv": [n * self.head_dim for n in (n_head, n_kv_head, n_kv_head)]}  # rows of each matrix
        self.projection = nn.Linear(n_embd, n_embd, bias=bias)  # W_O
        self.qk_norm = rms_unweighted(self.head_dim, bias) if qk_norm else nn.Identity()
        self.value_mix = ValueMix() if value_embeddings else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        rotation: Rotation | None = None,
        token_values: Tensor | None = None,
    ) -> Tensor:
        """Attend from each position of x to itself and to earlier positions.

        Args:
            x: (B, T, C).
            mask: Bool, broadcastable to (B, 1, T, S), true where a query attends to a key, or float, added to the
                scores. It replaces the causal mask, so a mask for a decoder must be causal too. `None` means causal.
            cache: Keys and values of the S - T positions before x; those of x are appended.
            rotation: Angles of the positions of x, for rotary positions. `None` means no rotation.
            token_values: Value embeddings of the tokens of x, (B, T, H_kv D), if the layer has `value_embeddings`.

        Returns:
            (B, T, C).
        """
        query, key, value = self._heads(x, rotation, token_values)
        if cache is not None:
            key, value = cache.update(key, value)  # (B, H_kv, S, D)
        if self.implementation == "fused":
            output = self._attend_fused(query, key, value, mask)  # (B, H, T, D)
        else:
            output, _ = self._attend_explicit(query, key, value, mask)
        return self.projection(output.transpose(1, 2).reshape(x.shape))  # heads concatenated: (B, T, C)

    def weights(self, x: Tensor, mask: Tensor | None = None, rotation: Rotation | None = None) -> Tensor:
        """Return the weights of `forward` without a cache, before dropout: (B, T, C) -> (B, H, T, T)."""
        return self._attend_explicit(*self._heads(x, rotation), mask)[1]

    def _heads(
        self, x: Tensor, rotation: Rotation | None = None, token_values: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, (B, H, T, D), and keys and values, (B, H_kv, T, D); the heads are a batch dimension."""
        H, H_kv = self.n_head, self.n_kv_head  # noqa: N806
        heads = self.qkv(x).unflatten(-1, (H + 2 * H_kv, self.head_dim)).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        query_key, value = heads.split([H + H_kv, H_kv], dim=1)
        if rotation is not None:
            query_key = rotate(query_key, rotation)
        query, key = self.qk_norm(query_key).split([H, H_kv], dim=1)
        if self.value_mix is not None and token_values is not None:
            value = self.value_mix(value, token_values)
        return query, key, value

    def _attend_explicit(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if mask is None:
            mask = causal_mask(query.size(2), key.size(2), query.device)
        if self.n_kv_head != self.n_head:
            key, value = (part.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for part in (key, value))
        return scaled_dot_product_attention(query, key, value, mask, self._dropout_p, self.scale)

    def _attend_fused(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        T, S = query.size(2), key.size(2)  # noqa: N806
        # The causal flag of the flash kernels counts both queries and keys from 0, which is right only if T = S. If
        # T < S, a single query attends to all keys, and several queries need an explicit mask.
        if mask is None and 1 < T < S:
            mask = causal_mask(T, S, query.device)
        is_causal = mask is None and T == S
        grouped = self.n_head != self.n_kv_head
        if grouped and T == 1:
            # The queries of a group attend as T queries of one head: torch's fast kernels take a mask or groups.
            query = query.reshape(len(query), self.n_kv_head, -1, self.head_dim)  # (B, H_kv, H / H_kv, D)
            output = F.scaled_dot_product_attention(query, key, value, mask, self._dropout_p, scale=self.scale)
            return output.reshape(len(query), self.n_head, 1, self.head_dim)
        return F.scaled_dot_product_attention(
            query, key, value, mask, self._dropout_p, is_causal, scale=self.scale, enable_gqa=grouped
        )

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the weights of each attention layer that runs within the context, (B, H, T, T), in order of execution.

    Hooks compute the weights in addition to the forward pass, so the model is not slower outside of the context.
    """
    recorded: list[Tensor] = []

    @torch.no_grad()
    def record(attention: MultiHeadAttention, arguments: tuple, keywords: dict[str, Any], output: Tensor) -> None:
        given = inspect.signature(attention.forward).bind(*arguments, **keywords).arguments
        recorded.append(attention.weights(given["x"], given.get("mask"), given.get("rotation")))

    layers = (layer for layer in model.modules() if isinstance(layer, MultiHeadAttention))
    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
