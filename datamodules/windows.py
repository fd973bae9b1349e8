"""Windows of a tokenised text, and their order in each epoch."""

from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.base import MOST_IN_MEMORY, LazyOrder, Order, Permutation, hashed
from datamodules.token_files import JoinedTokens, Tokens
from lightning_modules.common.targets import IGNORED


def random_windows(n_tokens: int, block_size: int, seed: int) -> tuple[int, Order]:
    """Return the number of windows in an epoch, and their order: starts are drawn with replacement in each epoch."""
    n = n_tokens // block_size
    # After the last start there is room for a window and the target of its last token.
    last = n_tokens - block_size
    if n <= MOST_IN_MEMORY:
        return n, lambda epoch: torch.from_numpy(np.random.default_rng([seed, epoch]).integers(last, size=n))

    def order(epoch: int) -> LazyOrder:
        key = np.random.default_rng([seed, epoch]).integers(2**63).astype(np.uint64)
        return LazyOrder(n, lambda places: (hashed(places.astype(np.uint64) + key) % np.uint64(last)).astype(np.int64))

    return n, order


def sequential_windows(n_tokens: int, block_size: int, seed: int) -> tuple[int, Order]:
    """Return the number of windows in an epoch, and their order: windows do not overlap and are shuffled.

    The first window starts at an offset that is drawn for each epoch, so that the boundaries move. An epoch skips less
    than two windows of text, at the beginning and the end, and no text is skipped in all epochs.
    """
    n = max(1, n_tokens // block_size - 1)  # one less than would fit, to leave room for the offset
    spare = n_tokens - 1 - n * block_size

    def order(epoch: int) -> Tensor | LazyOrder:
        rng = np.random.default_rng([seed, epoch])
        offset = rng.integers(spare + 1)
        if n > MOST_IN_MEMORY:
            windows = Permutation(n, seed, epoch)
            return LazyOrder(n, lambda places: offset + block_size * windows(places))
        return torch.from_numpy(offset + block_size * rng.permutation(n))

    return n, order


def mixed_windows(n_tokens: Sequence[int], weights: Sequence[float], block_size: int, seed: int) -> tuple[int, Order]:
    """Return the number of windows in an epoch of several texts, and their order.

    Each text is cut into windows, which have a random order of their own, round and round. An epoch takes the next ones
    of each text, in proportion to the weights, and shuffles them. It is as long as it can be without a window that
    occurs twice: one text is used up, and the next epoch takes up the others where this one has left them. Rounding
    does not add up: after any number of epochs, the share of a text is right to a window.

    Args:
        n_tokens: Number of tokens of each text; the texts are one after the other in a file.
        weights: Share of each text, more than 0, in any unit.
        block_size: Length of a window, in tokens.
        seed: Seed of the orders.

    Raises:
        MisconfigurationException: If a text is too short, or its weight too small for a window in an epoch.
    """
    begins = np.cumsum([0, *n_tokens[:-1]])
    counts = [max(0, n - 1) // block_size for n in n_tokens]  # windows of each text
    shares = [Fraction(str(weight)) for weight in weights]
    total = sum(shares)
    # An epoch has up to two windows of a text more than its share.
    n = min(int((count - 2) * total / share) for count, share in zip(counts, shares, strict=True))
    problems = [(i, "three are needed") for i, count in enumerate(counts) if count < 3]
    problems += [(i, "an epoch has less than one of them") for i, share in enumerate(shares) if n * share < total]
    for number, problem in problems[:1]:
        raise MisconfigurationException(
            f"data.source: source {number + 1} of the mixture has {counts[number]:,} training windows of {block_size} "
            f"tokens, and {problem}: give it more text or a larger weight, or make data.block_size smaller"
        )
    bounds = [sum(shares[:i], Fraction(0)) / total for i in range(len(shares) + 1)]  # of the shares in an epoch
    orders = [Permutation(count, seed, number) for number, count in enumerate(counts)]

    def taken(epoch: int) -> np.ndarray:
        """Return the number of windows of each text in the epochs before this one."""
        return np.diff([round(epoch * n * bound) for bound in bounds])

    def order(epoch: int) -> LazyOrder:
        before = taken(epoch)
        ends = np.cumsum(taken(epoch + 1) - before)
        shuffle = Permutation(n, seed, epoch)

        def starts(places: np.ndarray) -> np.ndarray:
            numbers = shuffle(places)
            texts = np.searchsorted(ends, numbers, side="right")
            found = np.empty_like(numbers)
            for text, begin in enumerate([0, *ends[:-1]]):
                chosen = texts == text
                window = orders[text]((before[text] + numbers[chosen] - begin) % counts[text])
                found[chosen] = begins[text] + block_size * window
            return found

        return LazyOrder(n, starts)

    return n, order


class TokenWindows(Dataset):
    """Windows of a token file, indexed by the positions of their first tokens. After the end of the file is padding.

    Args:
        file: Token file.
        block_size: Number of tokens in a window.
        byte_lengths: Number of UTF-8 bytes of each token, (vocab,).
        pad_token_id: Input after the end of the file; its target is ignored.
        **labels: Entries that each batch has too, such as the name of the text.
    """

    def __init__(
        self, file: Tokens, block_size: int, byte_lengths: np.ndarray, pad_token_id: int = 0, **labels: str
    ) -> None:
        self.file, self.block_size, self.byte_lengths, self.pad_token_id = file, block_size, byte_lengths, pad_token_id
        self.labels = labels

    @cached_property
    def tokens(self) -> np.ndarray | JoinedTokens:
        """The tokens of the file, (n_tokens,), mapped into memory."""
        return self.file.open()

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a mapped file would copy its content; a worker maps the file itself.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}

    def covering_starts(self, most: int | None = None) -> Tensor:
        """Return the starts of windows that predict each token except the first exactly once, (n,) int64.

        Args:
            most: Number of windows, if there are more: those are returned that are spread evenly over the file.
        """
        starts = torch.arange(0, self.file.n_tokens - 1, self.block_size)
        if most is None or most >= len(starts):
            return starts
        # float32, as ever, so that a run keeps its windows; beyond 2^24 the last place may be rounded up.
        return starts[torch.linspace(0, len(starts) - 1, most).long().clamp(max=len(starts) - 1)]

    def __getitem__(self, starts: Tensor) -> dict[str, Any]:
        """Return the windows that start at these positions, (B,) int64.

        Returns:
            `input_ids` and `targets`, (B, T) int64, and `target_bytes`, the number of UTF-8 bytes of the targets, ().
        """
        places = starts.numpy()[:, None] + np.arange(self.block_size + 1)  # (B, T + 1)
        tokens = self.tokens[np.minimum(places, self.file.n_tokens - 1)].astype(np.int64)
        beyond = places >= self.file.n_tokens
        inputs = np.where(beyond, self.pad_token_id, tokens)[:, :-1]
        targets = np.where(beyond, IGNORED, tokens)[:, 1:]
        return {
            "input_ids": torch.from_numpy(np.ascontiguousarray(inputs)),
            "targets": torch.from_numpy(np.ascontiguousarray(targets)),
            "target_bytes": torch.tensor(int((self.byte_lengths[tokens] * ~beyond)[:, 1:].sum())),
            **self.labels,
        }
