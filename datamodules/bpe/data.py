"""Text for learning a tokenizer: the documents of any source, as a stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.base import ExperimentDataModule
from datamodules.sources import AnySource, source_of
from datamodules.splits import CUT_FEW, SIDES, DocumentSplit, Side, SplitDocuments, describe, require_fractions
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt


class BPEDataModule(ExperimentDataModule):
    """The text of a source in pieces, with some documents held out. A batch is a list of texts.

    Nothing is tokenised or written. Each epoch and each validation reads the source from its beginning, and so does
    each process, which keeps its share of every batch.

    Args:
        source: The text: a source, or a file, folder, glob pattern, URL or `hub:OWNER/NAME`, see `source_of`.
        batch_size: Pieces in a batch, over all processes. A piece is a document, or a part of a long one.
        val_fraction: Part of the documents, or of each, that is held out for validation, 0 to less than 1.
        test_fraction: Part of the documents, or of each, that is held out for the test, 0 to less than 1.
        val_source: Text for validation, all of it, in place of a part of `source`.
        test_source: Text for the test, all of it, in place of a part of `source`.
        num_workers: Processes that read ahead; 0 reads in the training process. Each reads the whole source, so more
            than 1 helps only if a source is slow for other reasons than the disk or the network.
        split: `documents`: a hash of its beginning chooses the split of a document, so that copies share a split, and
            all runs and processes agree. `auto`: the same if there are more than 20, and some for each split; if not,
            the end of each is held out. `groups`: as `auto`, but documents with many lines in common share a split.
    """

    def __init__(
        self,
        source: AnySource,
        batch_size: PositiveInt = 256,
        val_fraction: float = 0.05,
        test_fraction: float = 0.0,
        val_source: AnySource | None = None,
        test_source: AnySource | None = None,
        num_workers: NonNegativeInt = 0,
        split: DocumentSplit = "documents",
    ) -> None:
        super().__init__(batch_size, num_workers)
        require_fractions(val_fraction, test_fraction)
        fractions = (0.0 if val_source else val_fraction, 0.0 if test_source else test_fraction)
        self.text = SplitDocuments(source_of(source), split, *fractions)
        self.splits = {side: SplitText(self.text, side) for side in SIDES}
        if val_source:
            self.splits["val"] = SplitText(SplitDocuments(source_of(val_source, "data.val_source")))
        if test_source:
            self.splits["test"] = SplitText(SplitDocuments(source_of(test_source, "data.test_source")))
        self.has_val = val_source is not None or val_fraction > 0

    def setup(self, stage: str) -> None:
        """Check that the splits of this stage have text.

        Raises:
            MisconfigurationException: If one has none.
        """
        if stage == "fit" and self.splits["train"].is_empty():
            raise MisconfigurationException("data.source: the corpus is empty; give text to learn from")
        needed: dict[str, list[Side]] = {"fit": ["val"] * self.has_val, "validate": ["val"], "test": ["test"]}
        for split in needed.get(stage, []):
            if self.splits[split].is_empty():
                raise MisconfigurationException(
                    f"there is no {split} text: no document was assigned to it; set data.{split}_fraction higher, "
                    f"or give data.{split}_source" + (CUT_FEW if self.text.split == "documents" else "")
                )
        if (few := self.text.few) is not None:
            fractions = self.text.val_fraction, self.text.test_fraction
            documents: dict[Side, int] = {"train": len(few)}
            sizes: dict[Side, int] = {"train": sum(document.bytes for document in few)}
            say(f"data    {describe('parts', documents, sizes, *fractions)}")

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training split."""
        return self._stream("train")

    def val_dataloader(self) -> DataLoader | list:
        """Return the loader of the validation split; an empty list if nothing is held out."""
        return self._stream("val") if self.has_val else []

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test split."""
        return self._stream("test")

    def _stream(self, split: Side) -> DataLoader:
        return self.loader_of_batches(BatchStream(self.splits[split], self.batch_size, *self._rank_and_world_size))


@dataclass
class SplitText:
    """The pieces of one split of some documents."""

    text: SplitDocuments
    split: Side = "train"

    def __iter__(self) -> Iterator[str]:
        return (piece.text for side, piece in self.text if side == self.split)

    def is_empty(self) -> bool:
        """Return whether there is no text; read no further than the first piece."""
        return next(iter(self), None) is None


class BatchStream(IterableDataset):
    """One process's share of each global batch of pieces, in the order of the source.

    The workers of a loader yield batches in turn, in the order in which the loader collects them. The last batch may
    have fewer than `batch_size` pieces, and the share of some processes may be empty.

    Attributes:
        skip: Number of global batches to skip at the start of the next iteration only.
    """

    def __init__(self, pieces: SplitText, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.pieces, self.batch_size, self.rank, self.world_size = pieces, batch_size, rank, world_size
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order of a stream is the same in each epoch."""

    def __iter__(self) -> Iterator[list[str]]:
        # As in GlobalBatches: nothing below runs before the first `next`.
        first, self.skip = self.skip, 0
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        pieces = iter(self.pieces)
        for k in count():
            batch = list(islice(pieces, self.batch_size))
            if not batch:
                return
            if k >= first and (k - first) % turns == turn:
                start, end = (len(batch) * part // self.world_size for part in (self.rank, self.rank + 1))
                yield batch[start:end]
