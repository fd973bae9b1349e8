"""Base of the datamodules: loaders whose order depends only on the seed and the epoch, so that a run can resume.

A dataset here maps positions to a whole batch: `dataset[positions]`, with positions (B,) int64, returns the
batch of the module, such as `{"input_ids": (B, T), ...}`. There is no `collate_fn`. A datamodule needs three steps:

1. Write such a dataset, and read or download the data in `prepare_data` and `setup`.
2. Return `self.training_loader(dataset, n)` from `train_dataloader`: it shuffles the `n` positions in each epoch.
3. Return `self.evaluation_loader(dataset, positions)` from `val_dataloader` and `test_dataloader`: it visits each
   position once. On several processes, each gets a share of every batch; the share of the last batch may be empty
   (B = 0), which dataset and module must accept.

A batch with padding should have `n_tokens`, a scalar tensor with the number of its tokens, for the logged speed.

If the datamodule has the attributes `vocab_size`, `pad_token_id`, `block_size` or `classes`, the command passes them to
the arguments of the module that have the same names.
"""

import multiprocessing
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from datamodules.cache import digest
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt
from lightning_modules.common.signals import STOPS

# Maps an epoch to its positions in order, (n,) int64. The same epoch always gives the same order.
Order = Callable[[int], "Tensor | LazyOrder"]

MOST_IN_MEMORY = 2**26  # positions of an order that is kept in memory, half a gigabyte

_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of SplitMix64
_ROUNDS = 6


def shuffled(n: int, seed: int) -> Order:
    """Return the order that shuffles 0 to n - 1 in each epoch."""
    if n > MOST_IN_MEMORY:
        return lambda epoch: LazyOrder(n, Permutation(n, seed, epoch))
    return lambda epoch: torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


class LazyOrder:
    """An order of which only the positions that are asked for are computed.

    Args:
        n: Number of positions.
        compute: Maps places in the order, (k,) int64, to positions, (k,) int64.
    """

    def __init__(self, n: int, compute: Callable[[np.ndarray], np.ndarray]) -> None:
        self.n, self.compute = n, compute

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, places: slice) -> Tensor:
        """Return the positions at some consecutive places, (k,) int64."""
        return torch.from_numpy(self.compute(np.arange(*places.indices(self.n), dtype=np.int64)))

    def __add__(self, offset: int) -> "LazyOrder":
        """Return the order of the positions that are greater by an offset."""
        return LazyOrder(self.n, lambda places: self.compute(places) + offset)


class Permutation:
    """A random permutation of 0 to n - 1 that is computed number by number, and so needs no memory.

    A Feistel network permutes the numbers of an even number of bits: in each round, one half is combined with a hash of
    the other (Luby and Rackoff 1988, https://doi.org/10.1137/0217022). What it maps to n or more is mapped again, until
    it is less (Black and Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9).

    Args:
        n: Number of numbers.
        *key: Numbers that choose the permutation.
    """

    def __init__(self, n: int, *key: int) -> None:
        self.n = n
        self._bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # of a half
        self._keys = np.random.default_rng(key).integers(2**63, size=_ROUNDS).astype(np.uint64)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """Return where numbers of 0 to n - 1 are mapped to, in the same shape, int64."""
        found = self._network(numbers.astype(np.uint64))
        while (outside := found >= self.n).any():
            found[outside] = self._network(found[outside])
        return found.astype(np.int64)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._bits) - np.uint64(1)
        left, right = numbers >> self._bits, numbers & mask
        for key in self._keys:
            left, right = right, left ^ (hashed(right + key) & mask)
        return (left << self._bits) | right


def hashed(numbers: np.ndarray) -> np.ndarray:
    """Return hashes of numbers, uint64: the last steps of SplitMix64 (Steele et al. 2014)."""
    for factor, shift in zip(_MIX, (30, 27), strict=True):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def _as_in_the_first_epoch(order: Order) -> Order:
    return lambda epoch: order(0)


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore the signals to stop in the worker of a loader: the training process saves the run and ends its workers.

    A terminal, a container and a job scheduler send these signals to the whole process group.
    """
    for signal_number in STOPS:
        signal.signal(signal_number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # see `_Loader`


@cache
def _kill_workers_at_exit(process: int) -> None:
    """Let the process with this number kill the workers that are left when it exits.

    Without this, Python would send them SIGTERM, which they ignore, and wait for them for ever. Workers are left if an
    error or a second signal has kept the trainer from ending them.
    """
    # Not `atexit`, whose functions are not called in a process that multiprocessing has started.
    multiprocessing.util.Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # that of torch would call the end of a worker an error
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


class _Loader(DataLoader):
    """A loader that starts its workers while signals to stop are blocked, which the workers inherit.

    Until a worker calls `leave_signals_to_the_parent`, SIGTERM would end it, by a handler of torch, and so the run.
    """

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self.num_workers and hasattr(self.dataset, "skip"):
            self.dataset.skip = 0  # the copies of a stream in the workers skip these batches
        return batches


def check_share(batch_size: int, world_size: int) -> None:
    """Raise a `MisconfigurationException` if a global batch cannot be shared equally by so many processes."""
    if batch_size % world_size:
        raise MisconfigurationException(
            f"data.batch_size is {batch_size}, the global batch over all {world_size} processes: "
            f"give a multiple of {world_size}"
        )


def _digest_of(n: int, batch: Any) -> str | None:
    """Return a hash of the number of examples and the `input_ids` of a batch; `None` if the batch has none."""
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    if not isinstance(ids, Tensor) or ids.layout != torch.strided or ids.is_floating_point():
        return None
    return digest([n, ids.tolist()])


class GlobalBatches(SequentialSampler):
    """The positions of one process's share of each global batch, (share,) int64.

    A global batch is the same for any number of processes, so two processes train on the same batches as one. The order
    depends on the epoch alone: a resumed run calls `set_epoch` and sets `skip`, and continues where it stopped.

    It is a `SequentialSampler` because Lightning replaces other samplers if `trainer.overfit_batches` is set.

    Args:
        n: Number of positions in an epoch.
        order: Order of the positions in each epoch.
        batch_size: Positions in a global batch, over all processes.
        rank: Rank of this process.
        world_size: Number of processes.
        drop_last: Whether to drop an incomplete last batch. If not, it is split as evenly as possible, and the share of
            some processes may be empty.

    Attributes:
        skip: Number of global batches to skip at the start of the next iteration only.
    """

    def __init__(
        self, n: int, order: Order, batch_size: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> None:
        self.n, self.order, self.batch_size = n, order, batch_size
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # As this is a generator, nothing below runs before the first `next`. A loader with workers calls `iter` twice
        # before that, and the first call must not reset `skip`.
        order = self.order(self.epoch)
        first, self.skip = self.skip, 0
        for k in range(first, len(self)):
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
            # A clone, because a view is sent to a worker with the whole storage behind it.
            yield batch.tensor_split(self.world_size)[self.rank].clone()


class ExperimentDataModule(LightningDataModule):
    """Base of the datamodules, with a loader for training and one for evaluation; see the top of this file.

    Args:
        batch_size: Examples in a global batch, over all processes, at least 1.
        num_workers: Processes that load ahead; 0 loads in the training process. The batches are the same.
        seed: Seed of the order of the training data, 0 or greater.
    """

    against_few_examples = "give more data or a smaller batch"  # what a user can do if an epoch has less than a batch

    def __init__(self, batch_size: PositiveInt, num_workers: NonNegativeInt = 0, seed: NonNegativeInt = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._examples: str | None = None  # see `_check_examples`
        self._examples_of_checkpoint: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint knows of the training examples."""
        return {} if self._examples is None else {"examples": self._examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what a checkpoint knows of the training examples, with which the next training loader compares."""
        self._examples_of_checkpoint = state_dict.get("examples")

    def __str__(self) -> str:
        """Return the name of the class. Lightning's method makes all loaders, and the parser calls it for an error."""
        return type(self).__name__

    def training_loader(self, dataset: Dataset, n: int, order: Order | None = None) -> DataLoader:
        """Return the loader of `n` positions, by default shuffled, without an incomplete last batch.

        The first batch is read here, so that a checkpoint can tell whether the examples have changed.

        Raises:
            MisconfigurationException: If there is less than a batch, the processes cannot share one evenly, or the
                examples are not those of the checkpoint of a resumed run.
        """
        check_share(self.batch_size, self._rank_and_world_size[1])
        if n < self.batch_size:
            raise MisconfigurationException(
                f"an epoch has {n} training examples, too few for one batch of data.batch_size {self.batch_size}: "
                f"{self.against_few_examples}"
            )
        order = lru_cache(maxsize=1)(order or shuffled(n, self.seed))
        self._check_examples(dataset, n, order)
        if self.trainer is not None and self.trainer.overfit_batches:
            return self._loader(dataset, n, _as_in_the_first_epoch(order), drop_last=True)
        return self._loader(dataset, n, order, drop_last=True)

    def _check_examples(self, dataset: Dataset, n: int, order: Order) -> None:
        """Refuse a resumed run whose training examples are not those of its checkpoint, such as of a file that changed.

        The number of examples and the `input_ids` of the first batch are compared, once in a run. A dataset whose
        batches may have features in place of `input_ids` has a method `inputs`. If a batch differs when it is read
        again, as that of random examples, nothing is compared.
        """
        read, positions = getattr(dataset, "inputs", None) or dataset.__getitem__, order(0)[: self.batch_size]

        def examples() -> str | None:
            torch.manual_seed(self.seed)
            return _digest_of(n, read(positions))

        with torch.random.fork_rng(devices=[]):
            first, again = examples(), examples()
        self._examples = first if first == again else None
        expected, self._examples_of_checkpoint = self._examples_of_checkpoint, None
        if None not in (expected, self._examples) and expected != self._examples:
            raise MisconfigurationException(
                "data: the training examples are not those that the checkpoint was trained on, so a text or a file has "
                "changed, and what the run has trained on may now be held out: restore it, or start a new run"
            )

    def evaluation_loader(self, dataset: Dataset, positions: Tensor) -> DataLoader:
        """Return the loader of a validation or test split, which visits these positions in this order, (n,) int64.

        Every process gets the same number of batches; B may be 0 in the last one.
        """
        return self._loader(dataset, len(positions), lambda epoch: positions, drop_last=False)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to the device; on the CPU, skip the search for tensors, which takes as long as a small layer."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        # Processes that hold parts of one model must see the same data; the strategy counts them as one.
        strategy = self.trainer.strategy if self.trainer else None
        kwargs = getattr(strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
        return kwargs["rank"], kwargs["num_replicas"]

    @property
    def _is_on_gpu(self) -> bool:
        """Whether batches go to a GPU; pinned memory would otherwise start CUDA in a run on the CPU."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _loader(self, dataset: Dataset, n: int, order: Order, drop_last: bool) -> DataLoader:
        return self.loader_of_batches(
            dataset,
            sampler=GlobalBatches(n, order, self.batch_size, *self._rank_and_world_size, drop_last),
            persistent_workers=self.num_workers > 0,
            pin_memory=self._is_on_gpu,
        )

    def loader_of_batches(self, dataset: Dataset, **options: Any) -> DataLoader:
        """Return the loader of a dataset of whole batches, whose workers leave signals to this process and end with it.

        Args:
            dataset: The dataset, or a stream of batches.
            **options: Arguments of `DataLoader`.
        """
        if self.num_workers:
            _kill_workers_at_exit(os.getpid())
        return _Loader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_parent,
            # By default, a loader draws the seed of its workers from the global generator, whose state must not change.
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )
