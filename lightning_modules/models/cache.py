"""Cache of the keys and values that attention has computed, so that generation computes each only once."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class KeyValueCache:
    """Keys and values of the positions that one attention layer has processed.

    The first update allocates memory for `max_length` positions, with the batch size, the number of heads, the dtype
    and the device of its arguments. Later updates write only their own positions. The cache is for inference: call it
    without gradients, because an update changes tensors that a backward pass may need.

    A CUDA graph repeats the same operations on the same memory, so a step of it cannot write to another slice or return
    a longer view each time. `fix` makes the shapes of a step constant: its position is a tensor, and attention reads
    the first `n_read` positions, of which a mask must exclude those that are not written yet.

    Args:
        max_length: Number of positions to allocate memory for.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0  # positions processed
        self._keys: Tensor | None = None  # (B, H, max_length, D)
        self._values: Tensor | None = None
        self._place: Tensor | None = None  # position to write to if the shapes are fixed, (1,) int64
        self._n_read = 0

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of T positions, (B, H, T, D), and return those that attention reads, (B, H, S, D).

        They are appended, and those of all S positions are returned as views. After `fix`, T is 1 and S is `n_read`.
        """
        if self._keys is None or self._values is None:
            B, H, _, D = key.shape  # noqa: N806
            # Zeros, because attention reads positions before they are written, and a weight of 0 times NaN is NaN.
            self._keys = key.new_zeros(B, H, self.max_length, D)
            self._values = value.new_zeros(B, H, self.max_length, value.size(3))
        if self._place is not None:
            self._keys.index_copy_(2, self._place, key)
            self._values.index_copy_(2, self._place, value)
            return self._keys[:, :, : self._n_read], self._values[:, :, : self._n_read]
        start, self.length = self.length, self.length + key.size(2)
        self._keys[:, :, start : self.length] = key
        self._values[:, :, start : self.length] = value
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the keys, which is that of the queries; `None` before the first update."""
        return None if self._keys is None else self._keys.dtype

    def fix(self, place: Tensor, n_read: int) -> None:
        """Make the next updates write one position, `place` (1,) int64, and return the first `n_read` positions."""
        self._place, self._n_read = place, n_read

    def release(self, length: int) -> None:
        """Append again in the next updates, after `length` positions."""
        self._place, self.length = None, length

    def clear(self) -> None:
        """Remove all positions, and keep the memory for the next update."""
        self.length = 0


class CachedModel(Protocol):
    """Interface of a model that `models.generation.generate` accepts, such as `models.decoder.Decoder`."""

    config: Any  # with the `vocab_size` and the `block_size` of the model
    training: bool

    def modules(self) -> Iterator[nn.Module]:
        """Return the modules of the model."""

    def new_cache(self, max_length: int) -> list[Any]:
        """Return an empty cache for at most `max_length` positions: `KeyValueCache` objects, or others that only grow.

        The others have a `length` and a method `clear()`; generation with them is not recorded.
        """

    def __call__(
        self,
        input_ids: Tensor,
        *,
        cache: list[Any],
        last_only: bool,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores of the next token, (B, 1, V), after tokens (B, T) that follow the cached ones.

        Args:
            input_ids: Tokens, (B, T) int64.
            cache: Result of `new_cache`.
            last_only: Whether to return the scores of the last position only; true.
            attention_mask: `None`; or (B, S), 0 at padding and 1 elsewhere, of the cached positions and the new ones;
                or the whole mask, (B, 1, T, S) in the dtype of the keys, which is added to the scores.
            position_ids: Positions of the tokens, (B, T) int64; `None` counts from the start of the row.
        """
