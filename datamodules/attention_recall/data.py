"""Multi-query associative recall (MQAR): pairs of a key and a value, then keys whose values are to be recalled.

    k3 v7 k1 v2 k8 v5 k1 ·  k8 k3       the sequence
     ·  ·  ·  ·  ·  · v2 ·  v5 v7       the answers

Paper: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023).
https://arxiv.org/abs/2312.04927
"""

from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule, hashed
from datamodules.splits import SIDES, Side
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt
from lightning_modules.common.targets import IGNORED

BLANK = 0  # the token of an empty position; the keys and then the values follow it
EXAMPLES_AN_EPOCH = 2**20  # the next epoch has other examples


class AttentionRecallDataModule(ExperimentDataModule):
    """Examples of associative recall, computed on request: none is stored, and none is trained on twice.

    A batch is `{"input_ids": (B, T), "targets": (B, T), "distances": (B, T), "n_pairs": (B,)}`, all int64. At a query,
    the target is the value of its key and the distance is the number of positions back to the key of the pair; at all
    other positions they are -100 and 0.

    Args:
        batch_size: Examples in a batch, over all processes.
        n_keys: Number of different keys.
        n_values: Number of different values.
        n_pairs: Numbers of pairs, each at least 1; an example has one of these numbers of pairs, drawn at random. The
            keys of an example are distinct, and so are its values.
        n_queries: Positions after the pairs that ask for one of them. The others are blank. A pair may be asked for
            several times.
        block_size: Tokens in an example, at least two for each pair and one for each query.
        val_examples: Examples in the validation split, and as many others in the test split.
        num_workers: Processes that load ahead; 0 loads in the training process.
        seed: Seed of the examples.
    """

    def __init__(
        self,
        batch_size: PositiveInt = 32,
        n_keys: PositiveInt = 16,
        n_values: PositiveInt = 16,
        n_pairs: Sequence[PositiveInt] = (4, 8),
        n_queries: PositiveInt = 16,
        block_size: PositiveInt = 32,
        val_examples: PositiveInt = 512,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if not n_pairs:
            raise MisconfigurationException("data.n_pairs is []: give one or more numbers of at least 1")
        most = max(n_pairs)
        for name, available in (("n_keys", n_keys), ("n_values", n_values)):
            if most > available:
                raise MisconfigurationException(
                    f"data.n_pairs has {most} pairs, more than the {available} of data.{name}: an example has none "
                    "twice; give fewer pairs or a larger vocabulary"
                )
        if block_size < 2 * most + n_queries:
            raise MisconfigurationException(
                f"data.block_size is {block_size}: {most} pairs (data.n_pairs) and {n_queries} queries "
                f"(data.n_queries) need at least {2 * most + n_queries} positions"
            )
        self.n_keys, self.n_values, self.n_pairs, self.n_queries = n_keys, n_values, tuple(n_pairs), n_queries
        self.block_size, self.val_examples = block_size, val_examples

    @property
    def vocab_size(self) -> int:
        """Number of tokens: the blank, the keys and the values; linked to the module."""
        return 1 + self.n_keys + self.n_values

    @property
    def token_names(self) -> list[str]:
        """Name of each token in a figure, by its id."""
        keys, values = range(1, 1 + self.n_keys), range(1, 1 + self.n_values)
        return ["·", *(f"k{i}" for i in keys), *(f"v{i}" for i in values)]

    def examples(self, split: Side) -> "RecallExamples":
        """Return all examples of a split."""
        return RecallExamples(self, split)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training split, in the order of the indices."""
        n = EXAMPLES_AN_EPOCH
        return self.training_loader(self.examples("train"), n, lambda epoch: torch.arange(epoch * n, (epoch + 1) * n))

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation split."""
        return self.evaluation_loader(self.examples("val"), torch.arange(self.val_examples))

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test split."""
        return self.evaluation_loader(self.examples("test"), torch.arange(self.val_examples))


class RecallExamples(Dataset):
    """An unlimited number of examples, each a function of the task and (seed, split, index)."""

    def __init__(self, task: AttentionRecallDataModule, split: Side) -> None:
        self.n_keys, self.n_values, self.n_pairs = task.n_keys, task.n_values, np.array(task.n_pairs)
        self.n_queries, self.block_size = task.n_queries, task.block_size
        self.stream = (task.seed, SIDES.index(split))

    def __getitem__(self, index: Tensor) -> dict[str, Tensor]:
        """Return the batch of the examples with these indices, (B,) int64."""
        B, T, most = len(index), self.block_size, self.n_pairs.max()  # noqa: N806
        parts = (1, self.n_keys, self.n_values, T, self.n_queries)
        bits = random_bits(*self.stream, index.numpy(), sum(parts))
        # The order that sorts random numbers is a random order; its first elements are a draw without replacement.
        choice, for_keys, for_values, for_places, for_questions = np.split(bits, np.cumsum(parts)[:-1], axis=1)
        n_pairs = self.n_pairs[choice % len(self.n_pairs)]  # (B, 1)
        keys = 1 + for_keys.argsort(axis=1)[:, :most]  # (B, most); an example uses the first n_pairs
        values = 1 + self.n_keys + for_values.argsort(axis=1)[:, :most]

        input_ids = np.full((B, T), BLANK)
        pairs = np.stack([keys, values], axis=2).reshape(B, 2 * most)
        input_ids[:, : 2 * most] = np.where(np.arange(2 * most) < 2 * n_pairs, pairs, BLANK)

        after_the_pairs = np.arange(T) >= 2 * n_pairs  # (B, T)
        places = np.where(after_the_pairs, for_places >> 1, 2**64 - 1).argsort(axis=1)[:, : self.n_queries]
        asked = (for_questions % n_pairs.astype(np.uint64)).astype(np.int64)  # (B, n_queries), the number of the pair
        rows = np.arange(B)[:, None]
        targets, distances = np.full((B, T), IGNORED), np.zeros((B, T), np.int64)
        input_ids[rows, places] = keys[rows, asked]
        targets[rows, places] = values[rows, asked]
        distances[rows, places] = places - 2 * asked
        batch = {"input_ids": input_ids, "targets": targets, "distances": distances, "n_pairs": n_pairs[:, 0]}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def random_bits(seed: int, split: int, index: np.ndarray, n: int) -> np.ndarray:
    """Return random numbers that are a function of the arguments, (B, n) uint64: one row for each index, (B,).

    They are those of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014), a
    counter that is scrambled. With NumPy, each example would need a new generator.
    """
    state = np.zeros(1, np.uint64)
    for part in (seed, split, index):
        state = hashed((state ^ np.asarray(part, np.uint64)) + _GOLDEN)  # (1,), at last (B,)
    return hashed(state[:, None] + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio, odd: its multiples visit every number
