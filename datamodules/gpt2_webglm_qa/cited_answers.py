"""Questions, references, and answers with citation marks: `[1]` cites the first reference, `[2][3]` cites two."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.files import as_flag
from datamodules.hub_datasets import load_hub_dataset
from datamodules.rows import columns_of, rows_of
from datamodules.sources import hub_name, local_files_of
from datamodules.splits import Side, require_fractions, side_of
from lightning_modules.common.citation_marks import cited, renumber
from lightning_modules.common.ranges import PositiveInt, Probability

Order = Literal["given", "shuffled", "none"]
Citations = Literal["keep", "strip", "renumber"]


@dataclass(frozen=True)
class Record:
    """A question, its references, an answer whose citation marks count them from 1, and where the record was read."""

    question: str
    answer: str
    references: tuple[str, ...]
    place: str = "record"
    n_removed: int = 0  # references that the answer may still cite: they followed those above and were removed

    @property
    def n_numbered(self) -> int:
        """Number of references that a mark can cite; a larger number in brackets, such as a year, is no citation."""
        return len(self.references) + self.n_removed


def arrange(record: Record, order: Order, marks: Citations, seed: int = 0) -> Record:
    """Return a record with its references in another order, and with citation marks that follow them.

    Args:
        record: Record to arrange.
        order: `given` keeps the order, `shuffled` draws one from the seed and the question, and `none` removes the
            references, so that the marks cite references that were removed.
        marks: `keep` keeps the marks, `strip` removes them, and `renumber` moves the cited references to the front, in
            the order of their first citation, so that the first mark is `[1]`.
        seed: Seed of the order `shuffled`.
    """
    numbers = list(range(1, len(record.references) + 1))  # old number of each reference, in the new order
    if order == "none":
        numbers = []
    elif order == "shuffled":
        random.Random(f"{seed} {record.question}").shuffle(numbers)
    if marks == "renumber":
        first = [number for number in dict.fromkeys(cited(record.answer)) if number in numbers]
        numbers = first + [number for number in numbers if number not in first]
    new_number: dict[int, int | None] = {old: new for new, old in enumerate(numbers, start=1)}
    if marks == "strip":
        new_number = dict.fromkeys(range(1, record.n_numbered + 1))
    return replace(
        record,
        answer=renumber(record.answer, lambda number: new_number.get(number, number)),
        references=tuple(record.references[number - 1] for number in numbers),
        n_removed=record.n_numbered - len(numbers),
    )


def parse_record(row: Any, place: str) -> Record:
    """Return the record in a dictionary with `question`, `answer` and, if it has some, `references`.

    The references are a list of texts, or one text, as in a table. Other fields are ignored.
    """
    if not isinstance(row, dict):
        raise MisconfigurationException(f"{place}: a record must be an object with question, answer and references")
    for field in ("question", "answer"):
        if field not in row:
            raise MisconfigurationException(
                f"{place}: the record has no field {field!r}, only {columns_of(row)}; "
                "give question, answer and, if there are passages to answer from, references"
            )
        if not isinstance(row[field], str):
            raise MisconfigurationException(f"{place}: {field!r} is {type(row[field]).__name__}, and must be text")
    references = row.get("references") or []
    if isinstance(references, str):
        references = [references]
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise MisconfigurationException(f"{place}: 'references' must be a list of texts")
    return Record(row["question"], row["answer"], tuple(references), place)


class RecordSource(ABC):
    """Base of the sources of records, in three splits; where they are held out of one part, they share no question."""

    @abstractmethod
    def records(self, side: Side) -> Iterator[Record]:
        """Yield the records of a split, always in the same order."""

    def flags_to_hold_out(self, side: Side) -> str | None:
        """Return the flags of `fit` that hold out records for a split; `None` if there are none."""
        return None

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Download or make the records, on one process of each machine."""


@dataclass
class HubRecords(RecordSource):
    """Records of a Hugging Face dataset with the fields of WebGLM-QA (Liu et al., 2023, https://arxiv.org/abs/2306.07906).

    Args:
        dataset: Name on the hub (`owner/name`), or a local folder with data files.
        train: Name of the split to train on.
        val: Name of the split to validate on.
        test: Name of the split to test on.
        max_records: Number of records to read from the start of each split; `null` for all.
        revision: Branch, tag or commit. With a commit, the run can be repeated after the dataset has changed.
    """

    dataset: str = "THUDM/webglm-qa"
    train: str = "train"
    val: str = "validation"
    test: str = "test"
    max_records: PositiveInt | None = None
    revision: str | None = None

    def prepare(self) -> None:
        """Download the dataset."""
        self._load("train")

    def records(self, side: Side) -> Iterator[Record]:
        """Yield the records of a split."""
        for number, row in enumerate(islice(self._load(side), self.max_records)):
            yield parse_record(row, f"dataset {self.dataset}, {getattr(self, side)}, row {number}")

    def _load(self, side: Side) -> Any:
        advice = "datamodules.gpt2_webglm_qa.JSONLines and experiments/gpt2_webglm_qa/offline.yaml need no network"
        return load_hub_dataset(self.dataset, getattr(self, side), revision=self.revision, advice=advice)


@dataclass
class JSONLines(RecordSource):
    """Files of rows with the fields `question`, `answer` and, if there are some, `references`.

    A file has JSON lines, or is a table (`.csv`, `.tsv`) or Parquet (`.parquet`); all but Parquet may be compressed
    (`.gz`, `.bz2`, `.xz`, `.zst`).

    Args:
        train: File or files to train on.
        val: File or files to validate on; `null` holds out a part of `train`.
        test: File or files to test on; `null` holds out a part of `train`.
        val_fraction: Part of `train` that is held out for validation if there is no `val`, 0 to less than 1. A hash of
            the question draws the split of a record.
        test_fraction: Part of `train` that is held out for the test if there is no `test`, 0 to less than 1.

    Raises:
        MisconfigurationException: If the fractions leave nothing to train on.
    """

    train: str | list[str]
    val: str | list[str] | None = None
    test: str | list[str] | None = None
    val_fraction: Probability = 0.1
    test_fraction: Probability = 0.0

    def __post_init__(self) -> None:
        fractions = (0.0 if self.val else self.val_fraction, 0.0 if self.test else self.test_fraction)
        self.fractions = require_fractions(*fractions, "data.records")

    def flags_to_hold_out(self, side: Side) -> str | None:
        """Return the flags of `fit` that hold out a part of the files to train on."""
        if side == "train" or getattr(self, side):
            return None
        train = as_flag([self.train] if isinstance(self.train, str) else self.train)
        return f"--data.records JSONLines --data.records.train {train} --data.records.{side}_fraction 0.2"

    def records(self, side: Side) -> Iterator[Record]:
        """Yield the records of a split."""
        files = getattr(self, side) or self.train
        is_own = side != "train" and bool(getattr(self, side))
        for file in [files] if isinstance(files, str) else files:
            for record in read_records(Path(file).expanduser()):
                if is_own or side_of(record.question, *self.fractions) == side:
                    yield record


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, see `JSONLines`."""
    for place, row in rows_of(path):
        yield parse_record(row, place)


# What a datamodule accepts as its records; see `records_of`.
AnyRecords = RecordSource | str | list[str] | Path


def records_of(records: AnyRecords) -> RecordSource:
    """Return the source that the setting `data.records` names: a source, files of rows, or `hub:OWNER/NAME`.

    Raises:
        MisconfigurationException: If it names no dataset and no files of this machine.
    """
    if isinstance(records, RecordSource):
        return records
    if (dataset := hub_name(records, "data.records")) is not None:
        return HubRecords(dataset)
    return JSONLines(local_files_of(records, "data.records"))
