"""Reviews with labels: from the hub, the folder of the original data set, JSON lines, or a table."""

import csv
import gzip
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.hub_datasets import load_hub_dataset
from datamodules.splits import Side, require_fractions, side_of

CLASSES = ("negative", "positive")

_BREAKS = re.compile(r"(?:\s*<br\s*/?>\s*)+", re.IGNORECASE)


@dataclass(frozen=True)
class Review:
    """A text and what it was judged to be.

    Args:
        text: Without line breaks of HTML.
        label: Number of its class, or `None` where nobody has said.
        film: What it is about, where that is known.
        place: Where it was found, for messages.
    """

    text: str
    label: int | None
    film: str | None = None
    place: str = "review"

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", without_breaks(self.text))


def without_breaks(text: str) -> str:
    """Puts a space in the place of the line breaks of HTML, and takes the space around the text away."""
    return _BREAKS.sub(" ", text).strip()


class ReviewSource(ABC):
    """A collection of reviews in three parts that share no film, where the films are known, and no text.

    Attributes:
        classes: Names of the classes; a label is the place of one among them.
    """

    classes: Sequence[str] = CLASSES

    @abstractmethod
    def reviews(self, side: Side) -> Iterator[Review]:
        """Yields the reviews of one part, always in the same order."""

    def unlabelled(self) -> Iterable[Review]:
        """Yields reviews without labels, to pretrain on; most sources have none."""
        return ()

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Does what one process a machine should do for all: downloads."""


def parse_review(
    row: Any, place: str, classes: Sequence[str] | None, text: str = "text", label: str = "label", film: str = "film"
) -> Review:
    """Reads a review from what a data set holds.

    Args:
        row: A dictionary; further fields are left alone.
        place: Where it stands, for messages.
        classes: Names of the classes; `None` where no label is needed.
        text: Name of the field with the text.
        label: Name of the field with the label: the number of a class, from 0, or its name.
        film: Name of the field with what the review is about, which may be missing.

    Raises:
        MisconfigurationException: If the text or the label is missing, the text is empty, or the label is of no class.
    """
    if not isinstance(row, dict):
        raise MisconfigurationException(f"{place}: a review is an object with the fields {text!r} and {label!r}")
    for field in (text, label) if classes else (text,):
        if row.get(field) is None:
            raise MisconfigurationException(
                f"{place}: the review has no {field!r}, only {', '.join(map(repr, row)) or 'nothing'}; give the names "
                "of the fields, or complete it"
            )
    if not isinstance(row[text], str):
        raise MisconfigurationException(f"{place}: {text!r} is {type(row[text]).__name__}, and must be text")
    about = None if row.get(film) in (None, "") else str(row[film])
    review = Review(row[text], _label(row[label], place, classes) if classes else None, about, place)
    if not review.text:
        raise MisconfigurationException(f"{place}: the review is empty; leave it out")
    return review


def _label(given: Any, place: str, classes: Sequence[str]) -> int:
    if given in classes:
        return classes.index(given)
    if not isinstance(given, bool) and str(given) in (numbers := list(map(str, range(len(classes))))):
        return numbers.index(str(given))
    raise MisconfigurationException(
        f"{place}: the label is {given!r}, and must be 0 to {len(classes) - 1} or one of {', '.join(classes)}"
    )


def read_reviews(path: Path, classes: Sequence[str] | None = CLASSES, **fields: str) -> Iterator[Review]:
    """Yields the reviews of a file: of a table (`.csv`) or JSON lines, either of them perhaps compressed (`.gz`).

    Args:
        path: The file, in UTF-8. A table begins with the names of its columns.
        classes: Names of the classes; `None` where no labels are needed.
        **fields: Names of the fields, see `parse_review`.

    Raises:
        MisconfigurationException: If the file is missing, or a line of it is no review (with its number).
    """
    if not path.is_file():
        raise MisconfigurationException(f"{path} does not exist: give a file of JSON lines, or a table (.csv)")
    rows = _table_rows if ".csv" in path.suffixes else _json_rows
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        try:
            for number, row in rows(file, path):
                yield parse_review(row, f"{path}, line {number}", classes, **fields)
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error) as error:
            raise MisconfigurationException(f"{path} could not be read: {error}") from error


def _json_rows(file: IO[str], path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise MisconfigurationException(
                    f"{path}, line {number}: is no JSON object on one line ({error})"
                ) from error


def _table_rows(file: IO[str], path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(file)
    columns = next(reader, [])
    begins = reader.line_num + 1  # a text may go over several lines
    for row in reader:
        if row and len(row) != len(columns):
            raise MisconfigurationException(
                f"{path}, line {begins}: {len(row)} columns, where the first line names {len(columns)}; put text with "
                "commas in quotation marks"
            )
        if row:
            yield begins, dict(zip(columns, row, strict=True))
        begins = reader.line_num + 1


class ReviewFiles(ReviewSource):
    """Files of JSON lines (`.jsonl`) or tables (`.csv`), with a review in each line; also compressed (`.gz`).

    Args:
        train: File, or files, to train on.
        val: File, or files, to validate on; `null` takes a part of `train`.
        test: File, or files, to test on; `null` takes a part of `train`.
        unlabelled_file: File of reviews without labels, to pretrain on; `null` for none.
        val_fraction: Part of `train` to validate on, 0 to less than 1. A hash decides, of the film where it is known,
            otherwise of the text: all reviews of a film are on one side.
        test_fraction: The same for the test.
        text_field: Name of the field, or column, with the text.
        label_field: Name of the one with the label: the number of a class, from 0, or its name.
        film_field: Name of the one with what the review is about; it may be missing.
        classes: Names of the classes.

    Raises:
        MisconfigurationException: If the fractions leave nothing to train on, or there are fewer than two classes.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        unlabelled_file: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        text_field: str = "text",
        label_field: str = "label",
        film_field: str = "film",
        classes: list[str] | tuple[str, ...] = CLASSES,
    ) -> None:
        given = {"train": train, "val": val, "test": test}
        self.files = {side: [files] if isinstance(files, str) else files for side, files in given.items() if files}
        self.unlabelled_file = unlabelled_file
        self.fractions = require_fractions(0.0 if val else val_fraction, 0.0 if test else test_fraction, "data.reviews")
        self.fields = {"text": text_field, "label": label_field, "film": film_field}
        if len(set(classes)) < 2 or len(set(classes)) != len(classes):
            raise MisconfigurationException(f"data.reviews: classes must be two or more names, got {list(classes)}")
        self.classes = list(classes)

    def reviews(self, side: Side) -> Iterator[Review]:
        """Yields the reviews of one part.

        Raises:
            MisconfigurationException: If a file is missing, or a line of it is no review (with its number).
        """
        for file in self.files.get(side) or self.files["train"]:
            for review in read_reviews(Path(file).expanduser(), self.classes, **self.fields):
                whole_file = side != "train" and side in self.files
                if whole_file or side_of(review.film or review.text, *self.fractions) == side:
                    yield review

    def unlabelled(self) -> Iterator[Review]:
        """Yields the reviews without labels."""
        if self.unlabelled_file:
            yield from read_reviews(Path(self.unlabelled_file).expanduser(), None, **self.fields)


class AclImdb(ReviewSource):
    """The folder `aclImdb` as its authors give it (Maas et al., 2011, https://ai.stanford.edu/~amaas/data/sentiment).

    Args:
        folder: The folder, with `train/` and `test/` in it.
        val_fraction: Part of the training films that is kept for validation, 0 to less than 1.
    """

    def __init__(self, folder: str, val_fraction: float = 0.1) -> None:
        self.folder = Path(folder).expanduser()
        self.val_fraction, _ = require_fractions(val_fraction, 0.0, "data.reviews")

    def reviews(self, side: Side) -> Iterator[Review]:
        """Yields the reviews of one part, each class in the order of the reviews' numbers.

        Raises:
            MisconfigurationException: If the folder is incomplete, or a review is empty.
        """
        part = "test" if side == "test" else "train"
        for label, name in enumerate(("neg", "pos")):
            for review in self._read(part, name, label):
                if side == "test" or side_of(review.film or review.text, self.val_fraction, 0.0) == side:
                    yield review

    def unlabelled(self) -> Iterator[Review]:
        """Yields the 50,000 reviews of `train/unsup`, which nobody has labelled."""
        return self._read("train", "unsup", None)

    def _read(self, part: str, name: str, label: int | None) -> Iterator[Review]:
        folder = self.folder / part / name
        if not folder.is_dir():
            raise MisconfigurationException(
                f"{folder} does not exist: give the folder aclImdb, unpacked from aclImdb_v1.tar.gz"
            )
        urls = self.folder / part / f"urls_{name}.txt"  # line i is the film of review i
        films = urls.read_text().split() if urls.is_file() else []
        files = sorted(folder.glob("*_*.txt"), key=lambda file: int(file.stem.split("_")[0]))
        for file, film in zip_longest(files, films[: len(files)]):
            row = {"text": file.read_text(encoding="utf-8"), "label": label, "film": film}
            yield parse_review(row, str(file), None if label is None else CLASSES)


class HubReviews(ReviewSource):
    """A Hugging Face dataset of texts with the numbers of their classes.

    Args:
        dataset: Name on the hub (`owner/name`), or a local folder with data files.
        train: Name of the split to train on.
        val: Name of the split to validate on; `null` takes a part of the training split.
        test: Name of the split to test on.
        unlabelled_split: Name of a split whose labels are not looked at, to pretrain on; `null` for none.
        val_fraction: Part of the training split to validate on, 0 to less than 1; a hash of its text decides where a
            review goes. The hub's copy of IMDB does not say which film a review is of.
        classes: Names of the classes.
        revision: Branch, tag or commit, for a run that can be repeated after the dataset has changed.
    """

    def __init__(
        self,
        dataset: str = "stanfordnlp/imdb",
        train: str = "train",
        val: str | None = None,
        test: str = "test",
        unlabelled_split: str | None = "unsupervised",
        val_fraction: float = 0.1,
        classes: list[str] | tuple[str, ...] = CLASSES,
        revision: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.splits = {"train": train, "val": val, "test": test}
        self.unlabelled_split = unlabelled_split
        self.val_fraction = 0.0 if val else require_fractions(val_fraction, 0.0, "data.reviews")[0]
        self.classes = list(classes)
        self.revision = revision

    def prepare(self) -> None:
        """Downloads."""
        self._load(self.splits["train"])

    def reviews(self, side: Side) -> Iterator[Review]:
        """Yields the reviews of one part.

        Raises:
            MisconfigurationException: If the dataset cannot be reached, or a row is no review.
        """
        whole_split = side != "train" and self.splits[side] is not None
        for review in self._read(self.splits[side] or self.splits["train"], self.classes):
            if whole_split or side_of(review.text, self.val_fraction, 0.0) == side:
                yield review

    def unlabelled(self) -> Iterator[Review]:
        """Yields the reviews without labels."""
        if self.unlabelled_split:
            yield from self._read(self.unlabelled_split, None)

    def _read(self, split: str, classes: Sequence[str] | None) -> Iterator[Review]:
        for number, row in enumerate(self._load(split)):
            yield parse_review(row, f"dataset {self.dataset}, {split}, row {number}", classes)

    def _load(self, split: str) -> Any:
        advice = "datamodules.bert_imdb.ReviewFiles and experiments/bert_imdb/offline.yaml need no network"
        return load_hub_dataset(self.dataset, split, revision=self.revision, advice=advice)
