r"""Attention: every position looks at the others and takes what it needs (notebooks 3.1 and 3.2).

Each position asks a question (its query q), offers a label (its key k) and holds a content (its value v). How well a
label answers a question is their dot product; softmax makes of these scores weights that sum to 1; the output is the
weighted mean of the contents:

    Attention(Q, K, V) = softmax(Q Kᵀ / √d) V

For random vectors of unit variance the dot product has variance d, their length; the division by √d brings it back to
1, where softmax still has a gradient. Multi-head attention does this n_head times at once, each head in its own
n_embd / n_head dimensions, and mixes the heads' outputs with one more matrix:

    MultiHead(x) = Concat(head_1, ..., head_h) W_O,    head_i = Attention(x W_Q,i, x W_K,i, x W_V,i)

In a decoder a position may look at itself and at the past only (causal attention): that is what the mask is for.

Paper: Vaswani et al., "Attention Is All You Need" (2017), sections 3.2.1 and 3.2.2. https://arxiv.org/abs/1706.03762

Shapes: B batch, T positions that ask, S positions that are looked at (T and what a cache remembers), C = n_embd,
H = n_head, D = C / H.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def causal_mask(n_query: int, n_key: int, device: torch.device | None = None) -> Tensor:
    """Which keys each query may look at, where the queries are the last `n_query` of `n_key` positions.

    Args:
        n_query: Number of queries T.
        n_key: Number of keys S, at least T.
        device: Where to build it.

    Returns:
        (T, S) bool, True where query t may look at key s: s <= t + (S - T).
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
    """Attention written out, one line a step of the formula.

    Args:
        query: (..., T, D) what each position asks for.
        key: (..., S, D) what each position offers.
        value: (..., S, D) what each position holds.
        mask: Bool, broadcastable to (..., T, S), True where the query may look at the key. None: everywhere. A query
            needs at least one key: softmax over nothing is not a number.
        dropout_p: Share of the weights set to zero, in [0, 1); the caller passes 0 outside training.
        scale: Factor on the dot products; None: 1 / √D.

    Returns:
        The output (..., T, D), and the weights (..., T, S) before dropout, which sum to 1 over S.
    """
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale  # (..., T, D) @ (..., D, S) -> (..., T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)  # e^-inf = 0: no weight
    weights = scores.softmax(dim=-1)  # (..., T, S)
    output = F.dropout(weights, dropout_p) @ value  # (..., T, S) @ (..., S, D) -> (..., T, D)
    return output, weights


class KeyValueCache:
    """The keys and values that one attention layer has computed so far, so that generation computes them only once.

    The memory for the whole context is taken at the first update, with the batch size, type and device found there:
    a step then writes its own rows and copies nothing. For inference: gradients do not reach across updates.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._keys: Tensor | None = None  # (B, H, max_length, D)
        self._values: Tensor | None = None

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, D); return all those remembered, (B, H, S, D), as views."""
        start, self.length = self.length, self.length + key.size(2)
        if self._keys is None:
            B, H, _, D = key.shape  # noqa: N806
            self._keys = key.new_empty(B, H, self.max_length, D)
            self._values = value.new_empty(B, H, self.max_length, D)
        self._keys[:, :, start : self.length] = key
        self._values[:, :, start : self.length] = value
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def clear(self) -> None:
        """Forget everything; the memory is kept for the next update."""
        self.length = 0


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention.

    Args:
        n_embd: Width C of the input and the output.
        n_head: Number of heads H; divides n_embd.
        dropout: Share of attention weights dropped in training, in [0, 1).
        bias: Whether the two projections add a bias.
        implementation: "fused" leaves the formula to torch's kernels (flash attention where the device has it), which
            never store the (T, S) weights; "explicit" runs `scaled_dot_product_attention` above. Both compute the same.
        scale: Factor on the dot products; None: 1 / √D.

    Raises:
        ValueError: n_head does not divide n_embd, or the implementation is not one of the two.
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
        """Attend from every position of x to itself and to the past.

        Args:
            x: (B, T, C).
            mask: Bool, broadcastable to (B, H, T, S), True where a query may look at a key. It takes the place of the
                causal mask, so it must hold it. None: causal.
            cache: Keys and values of the S - T positions before x; x's own are added to it.

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
        return self.projection(output.transpose(1, 2).reshape(x.shape))  # (B, T, C), the heads side by side again

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weights with which `forward` mixes the values of x, without a cache; to be looked at.

        Args:
            x: (B, T, C).
            mask: As in `forward`.

        Returns:
            (B, H, T, T), before dropout; each row sums to 1.
        """
        return self._attend_explicit(*self._heads(x), mask)[1]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of all heads: the heads become a batch dimension."""
        B, T, C = x.shape  # noqa: N806
        # (B, T, 3C) -> three of (B, T, C) -> three of (B, H, T, D)
        return tuple(
            part.view(B, T, self.n_head, self.head_dim).transpose(1, 2) for part in self.qkv(x).split(C, dim=-1)
        )

    def _attend_explicit(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if mask is None:
            mask = causal_mask(query.size(2), key.size(2), query.device)
        return scaled_dot_product_attention(query, key, value, mask, self._dropout_p, self.scale)

    def _attend_fused(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        T, S = query.size(2), key.size(2)  # noqa: N806
        # The flash kernels know causality by a flag, but count both queries and keys from 0, which is right only while
        # T = S. After that, one new position may look at everything, and several need the mask written out.
        if mask is None and 1 < T < S:
            mask = causal_mask(T, S, query.device)
        is_causal = mask is None and T == S
        return F.scaled_dot_product_attention(query, key, value, mask, self._dropout_p, is_causal, scale=self.scale)

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the weights of every attention layer that runs inside the `with`: (B, H, T, T) each, in that order.

    They are computed beside the model, which runs as fast as ever when nobody looks.

    Args:
        model: Any network with `MultiHeadAttention` in it, to be run without a cache.
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
