"""Caches of the keys and values that attention has computed, for generation."""

from torch import Tensor


class KeyValueCache:
    """Keys and values of the positions that one attention layer has processed, so that each is computed only once.

    The first update allocates memory for the whole context, with the batch size, dtype and device of its arguments.
    Later updates write only their own positions. The cache is for inference: gradients do not flow across updates.

    Args:
        max_length: Number of positions to allocate memory for.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._keys: Tensor | None = None  # (B, H, max_length, D)
        self._values: Tensor | None = None

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values, (B, H, T, D), and return those of all positions, (B, H, S, D), as views."""
        start, self.length = self.length, self.length + key.size(2)
        if self._keys is None or self._values is None:
            B, H, _, D = key.shape  # noqa: N806
            self._keys = key.new_empty(B, H, self.max_length, D)
            self._values = value.new_empty(B, H, self.max_length, D)
        self._keys[:, :, start : self.length] = key
        self._values[:, :, start : self.length] = value
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def clear(self) -> None:
        """Remove all positions, and keep the memory for the next update."""
        self.length = 0
