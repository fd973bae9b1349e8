"""Random sequences in which one token occurs more often than every other."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ExperimentDataModule
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt

Split = Literal["train", "val", "test"]


class MajorityDataModule(ExperimentDataModule):
    """Random sequences of tokens; the class of a sequence is its most frequent token.

    A batch is `{"input_ids": (B, T), "labels": (B,), "positions": (B,)}`, all int64.

    Args:
        batch_size: Sequences in a batch, over all processes.
        vocab_size: Number of tokens, which is also the number of classes.
        block_size: Tokens in a sequence.
        train_examples: Sequences to train on.
        val_examples: Sequences to validate on, and as many others to test on.
        num_workers: Processes that load ahead; 0 loads in the training process.
        seed: Seed of the sequences and of their order.
    """

    def __init__(
        self,
        batch_size: PositiveInt = 64,
        vocab_size: PositiveInt = 8,
        block_size: PositiveInt = 16,
        train_examples: PositiveInt = 4096,
        val_examples: PositiveInt = 512,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.vocab_size, self.block_size = vocab_size, block_size
        self.n_examples = {"train": train_examples, "val": val_examples, "test": val_examples}

    @property
    def classes(self) -> list[str]:
        """Names of the classes, linked to the module."""
        return [f"token {token}" for token in range(self.vocab_size)]

    def examples(self, split: Split) -> "MajoritySequences":
        """Return all examples of a split, the same each time."""
        seed = [self.seed, ("train", "val", "test").index(split)]
        return MajoritySequences(self.n_examples[split], self.vocab_size, self.block_size, seed)

    def margins(self, split: Split) -> Tensor:
        """Return by how much the most frequent token of each sequence leads, (n,) int64."""
        return self.examples(split).margins

    def train_dataloader(self) -> DataLoader:
        """Return the training split, shuffled anew in each epoch."""
        return self.training_loader(self.examples("train"), self.n_examples["train"])

    def val_dataloader(self) -> DataLoader:
        """Return the validation split."""
        return self.evaluation_loader(self.examples("val"), torch.arange(self.n_examples["val"]))

    def test_dataloader(self) -> DataLoader:
        """Return the test split."""
        return self.evaluation_loader(self.examples("test"), torch.arange(self.n_examples["test"]))


class MajoritySequences(Dataset):
    """Sequences with one most frequent token, as a function of a seed.

    Args:
        n: Number of sequences.
        vocab_size: Number of tokens, V.
        block_size: Tokens in a sequence, T.
        seed: Seed of the random numbers.
    """

    def __init__(self, n: int, vocab_size: int, block_size: int, seed: list[int]) -> None:
        rng = np.random.default_rng(seed)
        self.input_ids = torch.from_numpy(rng.integers(vocab_size, size=(n, block_size)))
        # Where several tokens are the most frequent, write one chosen token into the next place until one token leads.
        wanted = torch.from_numpy(rng.integers(vocab_size, size=n))
        for place in range(block_size):
            tied = margins_of(self.input_ids, vocab_size) == 0  # (n,)
            self.input_ids[tied, place] = wanted[tied]
        self.labels = counts_of(self.input_ids, vocab_size).argmax(dim=1)
        self.margins = margins_of(self.input_ids, vocab_size)

    def __getitem__(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the batch of these positions, (B,) int64."""
        return {"input_ids": self.input_ids[positions], "labels": self.labels[positions], "positions": positions}


def counts_of(input_ids: Tensor, vocab_size: int) -> Tensor:
    """Return how often each token occurs in each sequence: (n, T) to (n, V)."""
    return torch.nn.functional.one_hot(input_ids, vocab_size).sum(dim=1)


def margins_of(input_ids: Tensor, vocab_size: int) -> Tensor:
    """Return the lead of the most frequent token over the next: (n, T) to (n,)."""
    first, second = counts_of(input_ids, max(2, vocab_size)).topk(2, dim=1).values.unbind(dim=1)
    return first - second
