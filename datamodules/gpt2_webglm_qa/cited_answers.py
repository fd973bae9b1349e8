"""Questions, references, and answers that cite them by number: `[1]` is the first reference, `[2][3]` two at once."""

import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.hub_datasets import load_hub_dataset
from datamodules.splits import Side, require_fractions, side_of

Order = Literal["given", "shuffled", "none"]
Citations = Literal["keep", "strip", "renumber"]

_MARK = re.compile(r"\[(\d+)\]")
_MARKS_AND_SPACE = re.compile(r"(\s*)((?:\[\d+\])+)")


@dataclass(frozen=True)
class Record:
    """A question, its answer, and the references that the answer cites.

    Args:
        question: As a user asks it.
        answer: With citation marks, which count the references from 1.
        references: Passages of text.
        place: Where the record was found, for messages.
    """

    question: str
    answer: str
    references: tuple[str, ...]
    place: str = "record"


def citations(answer: str) -> list[int]:
    """The numbers that an answer cites, in order, as often as it does."""
    return [int(number) for number in _MARK.findall(answer)]


def renumber(answer: str, new_number: Callable[[int], int | None]) -> str:
    """Changes citation marks.

    Args:
        answer: Text with marks.
        new_number: The number that takes the place of one; `None` removes the mark, and with the last of several that
            stand together the space before them.
    """

    def change(marks: re.Match[str]) -> str:
        numbers = map(new_number, citations(marks[2]))
        left = "".join(f"[{number}]" for number in numbers if number is not None)
        return left and marks[1] + left

    return _MARKS_AND_SPACE.sub(change, answer)


def arrange(record: Record, order: Order, marks: Citations, seed: int = 0) -> Record:
    """Puts the references in an order, and lets the marks of the answer follow.

    Args:
        record: As it was found.
        order: `given`: as found. `shuffled`: drawn, by the seed and the question. `none`: without references, which
            leaves the answer's marks pointing at nothing.
        marks: `keep`; `strip` removes them all; `renumber` moves the cited references to the front, in the order in
            which the answer cites them, so that its first mark is `[1]`.
        seed: Of the shuffling.
    """
    numbers = list(range(1, len(record.references) + 1))  # the old number of each place
    if order == "none":
        numbers = []
    elif order == "shuffled":
        random.Random(f"{seed} {record.question}").shuffle(numbers)
    if marks == "renumber":
        cited = [number for number in dict.fromkeys(citations(record.answer)) if number in numbers]
        numbers = cited + [number for number in numbers if number not in cited]
    place_of = {old: new for new, old in enumerate(numbers, start=1)}
    # A mark that has no reference keeps its number, which points at none of the others either.
    answer = renumber(record.answer, lambda number: None if marks == "strip" else place_of.get(number, number))
    return replace(record, answer=answer, references=tuple(record.references[number - 1] for number in numbers))


def parse_record(row: Any, place: str) -> Record:
    """Reads a record from what a data set holds.

    Args:
        row: A dictionary with `question`, `answer` and `references`; further fields are left alone.
        place: Where it stands, for messages.

    Raises:
        MisconfigurationException: If a field is missing, or is not text or a list of texts.
    """
    if not isinstance(row, dict):
        raise MisconfigurationException(f"{place}: a record is an object with question, answer and references")
    for field in ("question", "answer", "references"):
        if field not in row:
            raise MisconfigurationException(
                f"{place}: the record has no field {field!r}, only {', '.join(map(repr, row)) or 'nothing'}; it needs "
                "question, answer and references"
            )
    for field in ("question", "answer"):
        if not isinstance(row[field], str):
            raise MisconfigurationException(f"{place}: {field!r} is {type(row[field]).__name__}, and must be text")
    references = row["references"]
    if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
        raise MisconfigurationException(f"{place}: 'references' must be a list of texts")
    return Record(row["question"], row["answer"], tuple(references), place)


class RecordSource(ABC):
    """A collection of records in three parts that share no question."""

    @abstractmethod
    def records(self, side: Side) -> Iterator[Record]:
        """Yields the records of one part, always in the same order."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Does what one process a machine should do for all: downloads, or makes the records."""


class HubRecords(RecordSource):
    """Records of a Hugging Face dataset with the fields of WebGLM-QA (Liu et al., 2023, https://arxiv.org/abs/2306.07906).

    Args:
        dataset: Name on the hub (`owner/name`), or a local folder with data files.
        train: Name of the split to train on.
        val: Name of the split to validate on.
        test: Name of the split to test on.
        max_records: Take only the first records of each split; `null` for all.
        revision: Branch, tag or commit, for a run that can be repeated after the dataset has changed.
    """

    def __init__(
        self,
        dataset: str = "THUDM/webglm-qa",
        train: str = "train",
        val: str = "validation",
        test: str = "test",
        max_records: int | None = None,
        revision: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.splits = {"train": train, "val": val, "test": test}
        self.max_records = max_records
        self.revision = revision

    def prepare(self) -> None:
        """Downloads."""
        self._load("train")

    def records(self, side: Side) -> Iterator[Record]:
        """Yields the rows of a split.

        Raises:
            MisconfigurationException: If the dataset cannot be reached, or a row is no record.
        """
        for number, row in enumerate(self._load(side)):
            if number == self.max_records:
                return
            yield parse_record(row, f"dataset {self.dataset}, {self.splits[side]}, row {number}")

    def _load(self, side: Side) -> Any:
        advice = "datamodules.gpt2_webglm_qa.JSONLines and experiments/gpt2_webglm_qa/offline.yaml need no network"
        return load_hub_dataset(self.dataset, self.splits[side], revision=self.revision, advice=advice)


class JSONLines(RecordSource):
    """Files of one JSON object a line, with the fields `question`, `answer` and `references`.

    Args:
        train: File, or files, to train on.
        val: File, or files, to validate on; `null` takes a part of `train`.
        test: File, or files, to test on; `null` takes a part of `train`.
        val_fraction: That part, 0 to less than 1. A hash of its question decides where a record goes.
        test_fraction: The same for the test.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
    ) -> None:
        files = {"train": train, "val": val, "test": test}
        self.files = {
            side: [given] if isinstance(given, str) else given for side, given in files.items() if given is not None
        }
        self.fractions = require_fractions(0.0 if val else val_fraction, 0.0 if test else test_fraction, "data.records")

    def records(self, side: Side) -> Iterator[Record]:
        """Yields the records of one part.

        Raises:
            MisconfigurationException: If a file is missing, or a line of it is no record (with its number).
        """
        for file in self.files.get(side) or self.files["train"]:
            for record in read_json_lines(Path(file).expanduser()):
                if (side != "train" and side in self.files) or side_of(record.question, *self.fractions) == side:
                    yield record


def read_json_lines(path: Path) -> Iterator[Record]:
    """Yields the records of a file; empty lines are left out.

    Args:
        path: File of one JSON object a line, in UTF-8.

    Raises:
        MisconfigurationException: If the file is missing, or a line of it is no record (with its number).
    """
    if not path.is_file():
        raise MisconfigurationException(f"{path} does not exist: give a file of JSON lines")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # malformed JSON, or no UTF-8
                raise MisconfigurationException(f"{place}: is no JSON object on one line ({error})") from error
            yield parse_record(row, place)
