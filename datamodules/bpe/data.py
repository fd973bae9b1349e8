"""Text for learning a tokenizer: the documents of any source, as a stream."""

from collections.abc import Iterator

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.base import ExperimentDataModule, leave_interrupts_to_the_parent
from datamodules.sources import Source
from datamodules.splits import require_fractions, side_of


class BPEDataModule(ExperimentDataModule):
    """The text of a source in pieces, with some documents held out. A batch is a list of texts.

    Nothing is tokenised or written: every epoch, and every validation, reads the source from its beginning, and so does
    every process, to keep its share of each batch.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 256,
        val_fraction: float = 0.05,
        test_fraction: float = 0.0,
        val_source: Source | None = None,
        test_source: Source | None = None,
        num_workers: int = 0,
    ) -> None:
        """Choose the text.

        Args:
            source: where the text comes from.
            batch_size: pieces in a batch, over all processes, at least 1. A piece is a document, or a part of a long
                one.
            val_fraction: part of the documents that is kept for validation, 0 to less than 1. A hash of its text
                decides where a document goes, so copies stay together, and runs and processes agree.
            test_fraction: part of the documents that is kept for the test, 0 to less than 1.
            val_source: text for validation, all of it, in place of a part of `source`.
            test_source: text for the test, all of it, in place of a part of `source`.
            num_workers: processes that read ahead; 0 reads in the training process. Each reads the whole source, so
                more than 1 pays only where a source is slow for other reasons than the disk or the network.
        """
        super().__init__(batch_size, num_workers)
        require_fractions(val_fraction, test_fraction)
        fractions = {"val": 0.0 if val_source else val_fraction, "test": 0.0 if test_source else test_fraction}
        self.sides = {
            "train": Side(source, "train", fractions["val"], fractions["test"]),
            "val": Side(val_source) if val_source else Side(source, "val", fractions["val"], fractions["test"]),
            "test": Side(test_source) if test_source else Side(source, "test", fractions["val"], fractions["test"]),
        }
        self.has_val = val_source is not None or val_fraction > 0

    def setup(self, stage: str) -> None:
        """Read until each side that this stage needs has shown some text.

        Raises:
            MisconfigurationException: a side has none.
        """
        if stage == "fit" and self.sides["train"].is_empty():
            raise MisconfigurationException("data.source: the corpus is empty; give text to learn from")
        needed = {"fit": ["val"] if self.has_val else [], "validate": ["val"], "test": ["test"]}.get(stage, [])
        for side in needed:
            if self.sides[side].is_empty():
                raise MisconfigurationException(
                    f"there is no {side} text: none of the documents fell to it; set data.{side}_fraction higher, or "
                    f"give data.{side}_source"
                )

    def train_dataloader(self) -> DataLoader:
        """Return the text to learn from."""
        return self._stream("train")

    def val_dataloader(self) -> DataLoader | list:
        """Return the validation text; nothing where no text was set aside."""
        return self._stream("val") if self.has_val else []

    def test_dataloader(self) -> DataLoader:
        """Return the test text."""
        return self._stream("test")

    def _stream(self, side: str) -> DataLoader:
        share = self._share
        stream = BatchStream(self.sides[side], self.batch_size, share["rank"], share["num_replicas"])
        return DataLoader(
            stream, batch_size=None, num_workers=self.num_workers, worker_init_fn=leave_interrupts_to_the_parent
        )


class Side:
    """The pieces of those documents of a source that fall to one side."""

    def __init__(
        self, source: Source, name: str = "train", val_fraction: float = 0.0, test_fraction: float = 0.0
    ) -> None:
        """Choose the side.

        Args:
            source: the text.
            name: train, val or test; train is the whole source where the fractions are 0.
            val_fraction: part of the documents on the side val.
            test_fraction: part of the documents on the side test.
        """
        self.source, self.name = source, name
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def __iter__(self) -> Iterator[str]:
        starts_document, side = True, ""
        for text, ends_document in self.source.pieces():
            if starts_document:
                side = side_of(text, self.val_fraction, self.test_fraction)
            if side == self.name:
                yield text
            starts_document = ends_document

    def is_empty(self) -> bool:
        """Read until there is some text."""
        return next(iter(self), None) is None


class BatchStream(IterableDataset):
    """One process's share of each global batch of pieces, in the order of the source.

    The workers of a loader take turns, batch by batch, which is the order in which the loader asks them.

    Attributes:
        skip: global batches to leave out at the start of the next iteration, and of that one only.
    """

    def __init__(self, pieces: Side, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Cut the pieces into global batches.

        Args:
            pieces: what to read.
            batch_size: pieces in a global batch; the last may have fewer.
            rank: this process.
            world_size: all processes. The share of some may be empty in the last batch.
        """
        self.pieces, self.batch_size, self.rank, self.world_size = pieces, batch_size, rank, world_size
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: a stream comes in one order."""

    def __iter__(self) -> Iterator[list[str]]:
        # As in GlobalBatches: nothing below runs before the first batch is asked for.
        first, self.skip = self.skip, 0
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        for k, batch in enumerate(self._global_batches()):
            if k >= first and (k - first) % turns == turn:
                start, end = (len(batch) * part // self.world_size for part in (self.rank, self.rank + 1))
                yield batch[start:end]

    def _global_batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        for text in self.pieces:
            batch.append(text)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch
