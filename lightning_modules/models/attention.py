r"""Attention: each position computes a weighted mean of the values of all positions (notebooks 3.1 and 3.2).

Each position has a query q, a key k and a value v. The dot product of the query of one position and the key of another
scores how relevant the second is to the first. Softmax turns the scores of a query into weights that sum to 1, and the
output is the weighted mean of the values:

    Attention(Q, K, V) = softmax(Q Kᵀ / √d) V

The dot product of two random vectors of length d and unit variance has variance d. Division by √d brings the variance
back to 1, where softmax still has a gradient. Multi-head attention computes n_head such means in parallel, each head in
n_embd / n_head dimensions of its own, and mixes the outputs of the heads with one more matrix:

    MultiHead(x) = Concat(head_1, ..., head_h) W_O,    head_i = Attention(x W_Q,i, x W_K,i, x W_V,i)

In a decoder, a position attends only to itself and to earlier positions (causal attention); a mask excludes the others.

Paper: Vaswani et al., "Attention Is All You Need" (2017), sections 3.2.1 and 3.2.2. https://arxiv.org/abs/1706.03762

Shapes: B batch size, T number of queries, S number of keys (T plus the positions in a cache), C = n_embd, H = n_head,
D = C / H.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.models.cache import KeyValueCache


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
            query, because softmax over no scores is NaN. `None` means everywhere.
        dropout_p: Probability of dropping a weight, in [0, 1); pass 0 outside training.
        scale: Factor on the dot products; `None` means 1 / √D.

    Returns:
        The output, (..., T, D), and the weights before dropout, (..., T, S), which sum to 1 over S.
    """
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale  # (..., T, D) @ (..., D, S) -> (..., T, S)
    if mask is not None:
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
        implementation: `fused` calls torch's kernels (flash attention if the device has it), which never store the
            (T, S) weights; `explicit` calls `scaled_dot_product_attention` above. Both compute the same function.
        scale: Factor on the dot products; `None` means 1 / √D.

    Raises:
        ValueError: If `n_head` does not divide `n_embd`, or the implementation is unknown.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        dropout: float = 0.0,
        bias: bool = True,
        implementation: Literal["fused", "explicit"] = "fused",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd={n_embd} is not divisible by n_head={n_head}: each head gets n_embd / n_head")
        if implementation not in ("fused", "explicit"):
            raise ValueError(f"attention implementation {implementation!r}: choose 'fused' or 'explicit'")
        self.n_head = n_head
        self.head_dim = n_embd // n_head
        self.dropout = dropout
        self.implementation = implementation
        self.scale = scale
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=bias)  # W_Q, W_K and W_V of all heads in one matrix product
        self.projection = nn.Linear(n_embd, n_embd, bias=bias)  # W_O

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Attend from each position of x to itself and to earlier positions.

        Args:
            x: (B, T, C).
            mask: Bool, broadcastable to (B, H, T, S), true where a query attends to a key. It replaces the causal mask,
                so a mask for a decoder must be causal too. `None` means causal.
            cache: Keys and values of the S - T positions before x; those of x are appended.

        Returns:
            (B, T, C).
        """
        query, key, value = self._heads(x)
        if cache is not None:
            key, value = cache.update(key, value)  # (B, H, S, D)
        if self.implementation == "fused":
            output = self._attend_fused(query, key, value, mask)  # (B, H, T, D)
        else:
            output, _ = self._attend_explicit(query, key, value, mask)
        return self.projection(output.transpose(1, 2).reshape(x.shape))  # heads concatenated: (B, T, C)

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weights of `forward` without a cache, before dropout: (B, T, C) -> (B, H, T, T)."""
        return self._attend_explicit(*self._heads(x), mask)[1]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of all heads; the heads become a batch dimension."""
        B, T, C = x.shape  # noqa: N806
        # (B, T, 3C) -> three of (B, T, C) -> three of (B, H, T, D)
        query, key, value = (
            part.view(B, T, self.n_head, self.head_dim).transpose(1, 2) for part in self.qkv(x).split(C, dim=-1)
        )
        return query, key, value

    def _attend_explicit(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if mask is None:
            mask = causal_mask(query.size(2), key.size(2), query.device)
        return scaled_dot_product_attention(query, key, value, mask, self._dropout_p, self.scale)

    def _attend_fused(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        T, S = query.size(2), key.size(2)  # noqa: N806
        # The causal flag of the flash kernels counts both queries and keys from 0, which is right only if T = S. If
        # T < S, a single query attends to all keys, and several queries need an explicit mask.
        if mask is None and 1 < T < S:
            mask = causal_mask(T, S, query.device)
        is_causal = mask is None and T == S
        return F.scaled_dot_product_attention(query, key, value, mask, self._dropout_p, is_causal, scale=self.scale)

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
    def record(attention: MultiHeadAttention, arguments: tuple, output: Tensor) -> None:
        x, mask, *_ = *arguments, None
        recorded.append(attention.weights(x, mask))

    layers = (layer for layer in model.modules() if isinstance(layer, MultiHeadAttention))
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
