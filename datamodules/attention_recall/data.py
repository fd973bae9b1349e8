"""Multi-query associative recall (MQAR): pairs of a key and a value, then keys whose values are asked for.

    k3 v7 k1 v2 k8 v5 k1 ·  k8 k3       the sequence
     ·  ·  ·  ·  ·  · v2 ·  v5 v7       what is to be answered

Paper: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023).
https://arxiv.org/abs/2312.04927
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule
from lightning_modules.common.targets import IGNORED

Split = Literal["train", "val", "test"]
BLANK = 0  # the token where nothing stands; keys and then values follow it
EXAMPLES_AN_EPOCH = 2**20  # of which there is no end: the next epoch has others


class AttentionRecallDataModule(ExperimentDataModule):
    """Examples made when they are asked for: no example is stored, and none is trained on twice.

    A batch is `{"input_ids": (B, T), "targets": (B, T), "distances": (B, T), "n_pairs": (B,)}`, all int64. Where a key
    is asked for, the target is its value and the distance is how many positions ago the key stood beside it; elsewhere
    they are -100 and 0.
    """

    def __init__(
        self,
        batch_size: int = 32,
        n_keys: int = 16,
        n_values: int = 16,
        n_pairs: Sequence[int] = (4, 8),
        n_queries: int = 16,
        block_size: int = 32,
        val_examples: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Choose the task.

        Args:
            batch_size: examples in a batch, over all processes, at least 1.
            n_keys: different keys that there are.
            n_values: different values that there are.
            n_pairs: how many pairs an example has: one of these numbers, at random. The keys of an example are all
                different, and so are its values.
            n_queries: positions after the pairs that ask for one of them, at least 1. The others are blank. A pair may
                be asked for several times.
            block_size: tokens in an example; two a pair and one a query must have room.
            val_examples: examples in the validation set, and as many others in the test set, at least 1.
            num_workers: processes that load ahead; 0 loads in the training process.
            seed: of the examples, 0 or greater.
        """
        super().__init__(batch_size, num_workers, seed)
        for name, value in (("n_queries", n_queries), ("val_examples", val_examples)):
            if value < 1:
                raise MisconfigurationException(f"data.{name} is {value}: it must be at least 1")
        if not n_pairs or min(n_pairs) < 1:
            raise MisconfigurationException(f"data.n_pairs is {list(n_pairs)}: give one or more numbers of at least 1")
        for name, there_are in (("n_keys", n_keys), ("n_values", n_values)):
            if max(n_pairs) > there_are:
                raise MisconfigurationException(
                    f"data.n_pairs has {max(n_pairs)} pairs, more than the {there_are} of data.{name}: an example has "
                    "none twice; give fewer pairs or a larger vocabulary"
                )
        if block_size < 2 * max(n_pairs) + n_queries:
            raise MisconfigurationException(
                f"data.block_size is {block_size}: {max(n_pairs)} pairs (data.n_pairs) and {n_queries} queries "
                f"(data.n_queries) need at least {2 * max(n_pairs) + n_queries} positions"
            )
        self.n_keys, self.n_values = n_keys, n_values
        self.n_pairs, self.n_queries = tuple(n_pairs), n_queries
        self.block_size = block_size
        self.val_examples = val_examples

    @property
    def vocab_size(self) -> int:
        """The number of tokens: the blank, the keys, the values."""
        return 1 + self.n_keys + self.n_values

    @property
    def token_names(self) -> list[str]:
        """What to call each token in a figure."""
        keys, values = range(1, 1 + self.n_keys), range(1, 1 + self.n_values)
        return ["·", *(f"k{i}" for i in keys), *(f"v{i}" for i in values)]

    def examples(self, split: Split) -> "RecallExamples":
        """Return all examples of a split."""
        return RecallExamples(
            self.n_keys, self.n_values, self.n_pairs, self.n_queries, self.block_size, self.seed, split
        )

    def train_dataloader(self) -> DataLoader:
        """Return examples to train on, in the order of their indices."""

        def order(epoch: int) -> Tensor:
            return torch.arange(epoch * EXAMPLES_AN_EPOCH, (epoch + 1) * EXAMPLES_AN_EPOCH)

        return self.training_loader(self.examples("train"), EXAMPLES_AN_EPOCH, order)

    def val_dataloader(self) -> DataLoader:
        """Return the validation set."""
        return self.evaluation_loader(self.examples("val"), torch.arange(self.val_examples))

    def test_dataloader(self) -> DataLoader:
        """Return the test set."""
        return self.evaluation_loader(self.examples("test"), torch.arange(self.val_examples))


class RecallExamples(Dataset):
    """Examples without end, each a pure function of the task and (seed, split, index)."""

    def __init__(
        self,
        n_keys: int,
        n_values: int,
        n_pairs: Sequence[int],
        n_queries: int,
        block_size: int,
        seed: int,
        split: Split,
    ) -> None:
        """Choose the task, as in `AttentionRecallDataModule`, and the split."""
        self.n_keys, self.n_values, self.n_pairs = n_keys, n_values, np.array(n_pairs)
        self.n_queries, self.block_size = n_queries, block_size
        self.stream = (seed, ("train", "val", "test").index(split))

    def __getitem__(self, index: Tensor) -> dict[str, Tensor]:
        """Make the examples of these indices (B,): a batch as `AttentionRecallDataModule` describes it."""
        B, T, most = len(index), self.block_size, self.n_pairs.max()  # noqa: N806
        parts = (1, self.n_keys, self.n_values, T, self.n_queries)
        bits = random_bits(*self.stream, index.numpy(), sum(parts))
        # The order that sorts random numbers is a random order: its beginning is a draw without replacement.
        choice, for_keys, for_values, for_places, for_questions = np.split(bits, np.cumsum(parts)[:-1], axis=1)
        n_pairs = self.n_pairs[choice % len(self.n_pairs)]  # (B, 1)
        keys = 1 + for_keys.argsort(axis=1)[:, :most]  # (B, most); an example has the first n_pairs of them
        values = 1 + self.n_keys + for_values.argsort(axis=1)[:, :most]

        input_ids = np.full((B, T), BLANK)
        pairs = np.stack([keys, values], axis=2).reshape(B, 2 * most)
        input_ids[:, : 2 * most] = np.where(np.arange(2 * most) < 2 * n_pairs, pairs, BLANK)

        after_the_pairs = np.arange(T) >= 2 * n_pairs  # (B, T)
        places = np.where(after_the_pairs, for_places >> 1, 2**64 - 1).argsort(axis=1)[:, : self.n_queries]
        asked = (for_questions % n_pairs.astype(np.uint64)).astype(np.int64)  # (B, n_queries), which pair
        rows = np.arange(B)[:, None]
        targets, distances = np.full((B, T), IGNORED), np.zeros((B, T), np.int64)
        input_ids[rows, places] = keys[rows, asked]
        targets[rows, places] = values[rows, asked]
        distances[rows, places] = places - 2 * asked
        batch = {"input_ids": input_ids, "targets": targets, "distances": distances, "n_pairs": n_pairs[:, 0]}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def random_bits(seed: int, split: int, index: np.ndarray, n: int) -> np.ndarray:
    """Return random numbers that depend on nothing but the arguments: (B, n) uint64, a row an index.

    SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014): a counter, scrambled.
    NumPy's generators would have to be made anew for each example; this makes those of a whole batch at once.

    Args:
        seed: 0 or greater.
        split: Number of the split.
        index: Numbers of the examples, (B,).
        n: Random numbers an example.
    """
    state = np.zeros(1, np.uint64)
    for part in (seed, split, index):
        state = _scramble((state ^ np.asarray(part, np.uint64)) + _GOLDEN)  # (1,), at last (B,)
    return _scramble(state[:, None] + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio, odd: its multiples visit every number


def _scramble(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> 31)
