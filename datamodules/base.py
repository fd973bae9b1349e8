"""What every datamodule shares: one loader factory, and an order of the data that can be picked up anywhere."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

# The positions of one epoch, in order: epoch -> (n,) int64. The same epoch always gives the same order.
Order = Callable[[int], Tensor]


def shuffled(n: int, seed: int) -> Order:
    """Return the order that shuffles 0..n-1 anew in each epoch."""
    return lambda epoch: torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


def leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C goes to all processes of a terminal, but a worker that died of it would take the run along, unsaved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class GlobalBatches(Sampler[Tensor]):
    """The positions of one process's share of each global batch: (share,) int64.

    A global batch is the same whatever the number of processes, so that two processes train on what one would. The
    order is a function of the epoch alone: a resumed run sets `set_epoch` and `skip`, and goes on where it stopped.

    Attributes:
        skip: global batches to leave out at the start of the next iteration, and of that one only.
    """

    def __init__(
        self, n: int, order: Order, batch_size: int, rank: int = 0, world_size: int = 1, drop_last: bool = True
    ) -> None:
        """Cut `n` positions in that order into global batches.

        Args:
            n: positions in an epoch.
            order: which position comes when.
            batch_size: positions in a global batch, over all processes.
            rank: this process.
            world_size: all processes.
            drop_last: leave out an incomplete last batch. If false, it is dealt out as evenly as it goes, and the
                share of some processes may be empty.
        """
        self.n, self.order, self.batch_size = n, order, batch_size
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # A generator on purpose: nothing below runs before the first batch is asked for. A loader with workers calls
        # iter() twice before that, and the first call must not use up `skip`.
        order = self.order(self.epoch)
        first, self.skip = self.skip, 0
        for k in range(first, len(self)):
            batch = order[k * self.batch_size : (k + 1) * self.batch_size]
            # A clone, because workers are sent the whole memory that a view stands on.
            yield batch.tensor_split(self.world_size)[self.rank].clone()


class ExperimentDataModule(LightningDataModule):
    """A datamodule whose loaders ask the dataset for whole batches: `dataset[positions]`, positions (share,) int64."""

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        """Remember how to load.

        Args:
            batch_size: examples in a global batch, over all processes, at least 1.
            num_workers: processes that load ahead; 0 loads in the training process. The batches are the same.
            seed: of the order of the data, 0 or greater.
        """
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("seed", seed, 0)):
            if value < least:
                raise MisconfigurationException(f"data.{name} is {value}: it must be at least {least}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def training_loader(self, dataset: Dataset, n: int, order: Order | None = None) -> DataLoader:
        """Return the loader of `n` positions, shuffled unless another order is given. Incomplete batches are left out.

        Raises:
            MisconfigurationException: the processes cannot share a batch evenly, or there is not one whole batch.
        """
        world_size = self._share["num_replicas"]
        if self.batch_size % world_size:
            raise MisconfigurationException(
                f"data.batch_size is {self.batch_size}, the global batch over all {world_size} processes: "
                f"give a multiple of {world_size}"
            )
        if n < self.batch_size:
            raise MisconfigurationException(
                f"an epoch has {n} training examples, too few for one batch of data.batch_size {self.batch_size}: "
                "give more data or a smaller batch"
            )
        return self._loader(dataset, n, order or shuffled(n, self.seed), drop_last=True)

    def evaluation_loader(self, dataset: Dataset, positions: Tensor) -> DataLoader:
        """Return the loader of these positions (n,), each once over all processes, in the order given.

        Every process gets the same number of batches; the last may be empty in some.
        """
        return self._loader(dataset, len(positions), lambda epoch: positions, drop_last=False)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; on the CPU it is there already, and looking for its tensors costs as much as a small layer.

        Args:
            batch: what the loader gave.
            device: where the model is.
            dataloader_idx: which loader it was.
        """
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def _share(self) -> dict[str, int]:
        # The strategy knows which processes hold parts of one model, and so must see the same data.
        alone = {"num_replicas": 1, "rank": 0}
        return getattr(self.trainer.strategy, "distributed_sampler_kwargs", alone) if self.trainer else alone

    def _loader(self, dataset: Dataset, n: int, order: Order, drop_last: bool) -> DataLoader:
        share = self._share
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=GlobalBatches(n, order, self.batch_size, share["rank"], share["num_replicas"], drop_last),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_interrupts_to_the_parent,
            pin_memory=torch.cuda.is_available(),
            # Its own, because starting a loader draws a seed for its workers, from the global generator by default.
            generator=torch.Generator().manual_seed(self.seed),
        )
