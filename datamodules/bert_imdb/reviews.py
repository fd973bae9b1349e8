"""Sources of labelled reviews: the hub, the folder of the original data set, and files of rows; and of plain text."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.files import ROWS, as_flag, decoded, ending_of, split_column
from datamodules.hub_datasets import load_hub_dataset
from datamodules.rows import columns_of, rows_of
from datamodules.sources import AnySource, ListText, hub_name, local_files_of, paths_of, source_of
from datamodules.splits import FEW, SIDES, Side, SplitDocuments, require_fractions, side_of, sides_of
from lightning_modules.common.ranges import Probability

CLASSES = ("negative", "positive")
MOST_CLASSES = 100  # that are found in the data; a column with more different values is probably no label

_ACL_FILE = re.compile(r"(\d+)_\d+\.txt")  # number and rating of a review
_BREAKS = re.compile(r"(?:\s*<br\s*/?>\s*)+", re.IGNORECASE)


@dataclass(frozen=True)
class Review:
    """A review: its text without line breaks of HTML, its class or `None`, its film if known, and where it was read."""

    text: str
    label: int | None
    film: str | None = None
    place: str = "review"

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", without_breaks(self.text))


def without_breaks(text: str) -> str:
    """Return a text whose HTML line breaks are replaced by spaces, without white space around it."""
    return _BREAKS.sub(" ", text).strip()


class ReviewSource(ABC):
    """Base of sources of reviews, in three splits.

    Where several are held out of one part, they share no text, and no film if the films are known.
    """

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; a label is an index into them."""
        return CLASSES

    @abstractmethod
    def reviews(self, split: Side) -> Iterator[Review]:
        """Yield the reviews of a split, always in the same order."""

    def unlabelled(self) -> Iterable[Review]:
        """Yield reviews without labels, to pretrain on; most sources have none."""
        return ()

    def without_labels(self) -> "ReviewSource":
        """Return the source of the same reviews, whose labels are not needed."""
        return self

    def n_held_out_for_test(self) -> int:
        """Return the number of test reviews that are held out of the training part; 0 if they have a part."""
        return 0

    def flags_to_hold_out(self, split: Side, named: bool) -> str | None:
        """Return the flags of `fit` that hold out a larger part for a split; `None` if there are none.

        Args:
            split: The split.
            named: Whether the settings name the class of this source, and not just a path.
        """
        return None

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to prepare
        """Download the reviews; called on one process of each machine."""


# What a datamodule accepts as its reviews; see `reviews_of`.
AnyReviews = ReviewSource | str | list[str] | Path


def reviews_of(reviews: AnyReviews, labelled: bool = True) -> ReviewSource:
    """Return the source that the setting `data.reviews` names.

    Args:
        reviews: A source; or, with labels, files of rows (see `ReviewFiles`), whose classes are found in them, or
            `hub:OWNER/NAME` or `hub:OWNER/NAME:COLUMN`, a Hugging Face dataset; or, without labels, any text, see
            `TextReviews`.
        labelled: Whether the labels are needed.

    Raises:
        MisconfigurationException: If reviews with labels are no files of rows on this machine, and no dataset.
    """
    if isinstance(reviews, ReviewSource):
        return reviews if labelled else reviews.without_labels()
    if not labelled:
        return TextReviews(reviews)
    if (name := hub_name(reviews, "data.reviews")) is not None:
        dataset, _, field = name.partition(":")
        return HubReviews(dataset, unlabelled_split=None, text_field=field or "text", classes=None)
    files = []
    for path, column in map(split_column, paths_of(reviews, "data.reviews")):
        for file in local_files_of(path, "data.reviews"):
            if ending_of(file) not in ROWS:
                raise MisconfigurationException(
                    f"data.reviews: {file} has no labels; give a file of rows with the columns 'text' and 'label' "
                    f"({', '.join(ROWS)})"
                )
            files.append(f"{file}:{column}" if column else file)
    return ReviewFiles(files, classes=None, exact=True)


class TextReviews(ReviewSource):
    """Any text as reviews without labels, to pretrain on: a document is a review.

    Args:
        source: The text: a source, or a file, folder, glob pattern, URL or `hub:OWNER/NAME`, see
            `datamodules.sources.source_of`.
        val_fraction: Fraction of the documents that is held out for validation, in [0, 1): those that `ReviewFiles`
            holds out exactly, where it knows no films. Of 20 or fewer, the end of each is held out.
        test_fraction: Fraction that is held out for the test, in [0, 1).
    """

    def __init__(self, source: AnySource, val_fraction: Probability = 0.1, test_fraction: Probability = 0.1) -> None:
        self.source = source_of(source, "data.reviews")
        self.fractions = require_fractions(val_fraction, test_fraction, "data.reviews")

    @cached_property
    def _by_side(self) -> dict[Side, list[Review]]:
        """The reviews of each split; the text is read once, as a fit needs all of them."""
        documents = list(self.source.documents())
        texts: Iterable[tuple[Side, str]]
        if len(documents) > FEW or not any(self.fractions):
            keys = list(filter(None, map(without_breaks, documents)))
            sides = sides_of(keys, *self.fractions)
            texts = ((sides[key], key) for key in keys)
        else:
            pieces = list(SplitDocuments(ListText(documents), "auto", *self.fractions))
            # A part of a document also ends where the side changes: its last piece does not say so.
            ended = accumulate((piece.ends_document for _, piece in pieces), initial=0)
            parts = groupby(zip(ended, pieces, strict=False), key=lambda item: (item[0], item[1][0]))
            texts = ((side, "".join(piece.text for _, (_, piece) in part)) for (_, side), part in parts)
        reviews: dict[Side, list[Review]] = {side: [] for side in SIDES}
        for side, text in texts:
            if without_breaks(text):
                reviews[side].append(Review(text, None))
        return reviews

    def reviews(self, split: Side) -> Iterator[Review]:
        """Yield the documents of a split, or its part of each."""
        yield from self._by_side[split]

    def n_held_out_for_test(self) -> int:
        """Return the number of test reviews."""
        return len(self._by_side["test"])


class PartedSource(ReviewSource):
    """Base of sources in parts, such as files. A split without a part is held out of the part `train`.

    A hash of the film, or of the text if the film is unknown, chooses the split, so that a film is in one split only.
    """

    parts: dict[str, Any]  # arguments of `read`, by split; `unlabelled` too, if there are reviews without labels
    fractions: tuple[float, float]  # of `train`, held out for validation and test
    given_classes: Sequence[str] | None = CLASSES  # names of the classes; `None` finds them
    exact = False  # whether the fractions are those of the films or texts, and not probabilities
    labelled = True  # whether the labels are read

    @abstractmethod
    def read(self, part: Any, classes: Sequence[str] | None) -> Iterator[Review]:
        """Yield the reviews of a part; `classes` is `None` to ignore the labels."""

    @cached_property
    def classes(self) -> Sequence[str]:
        """The names of the classes; if none are given, the labels of the part to train on."""
        return self.find_classes() if self.given_classes is None else list(self.given_classes)

    def find_classes(self) -> list[str]:
        """Return the labels of the part to train on, sorted; only of sources whose classes need not be given."""
        raise NotImplementedError

    @property
    def _read_classes(self) -> Sequence[str] | None:
        return self.classes if self.labelled else None

    def without_labels(self) -> "PartedSource":
        """Return the source of the same reviews, whose labels may be missing."""
        source = copy(self)
        source.labelled = False
        return source

    def reviews(self, split: Side) -> Iterator[Review]:
        """Yield the reviews of a split."""
        if split != "train" and split in self.parts:
            yield from self.read(self.parts[split], self._read_classes)
        else:
            yield from self._of_train[split]

    def n_held_out_for_test(self) -> int:
        """Return the number of test reviews that are held out of the training part; 0 if they have a part."""
        return 0 if "test" in self.parts else len(self._of_train["test"])

    @cached_property
    def _of_train(self) -> dict[Side, list[Review]]:
        """The reviews of the part `train` by split; it is read once, as a fit needs all of them."""
        read = self.read(self.parts["train"], self._read_classes)
        reviews = [(review.film or review.text, review) for review in read]
        sides = sides_of((key for key, _ in reviews), *self.fractions) if self.exact else None
        parts: dict[Side, list[Review]] = {side: [] for side in SIDES}
        for key, review in reviews:
            parts[sides[key] if sides else side_of(key, *self.fractions)].append(review)
        return parts

    def unlabelled(self) -> Iterator[Review]:
        """Yield the reviews without labels."""
        if "unlabelled" in self.parts:
            yield from self.read(self.parts["unlabelled"], None)


def parse_review(
    row: Any,
    place: str,
    classes: Sequence[str] | None,
    text: str = "text",
    label: str = "label",
    film: str = "film",
    may_be_empty: bool = False,
) -> Review:
    """Return the review in a row, a dictionary of fields that was read at `place`.

    `text`, `label` and `film` are the names of its fields; the film may be missing. The label is the name of a class,
    or its index unless a class has the index of another one as its name; it is ignored if `classes` is `None`. The text
    may be missing if it `may_be_empty`.

    Raises:
        MisconfigurationException: If the text or the label is missing, the text is empty, or the label is not a class.
    """
    if not isinstance(row, dict):
        raise MisconfigurationException(f"{place}: a review is an object with the fields {text!r} and {label!r}")
    for field in (text, label) if classes else (text,):
        if field not in row:
            named = "with the text as FILE:COLUMN" if field == text else "with the label as label_field"
            raise MisconfigurationException(
                f"{place}: the review has no {field!r}, only {columns_of(row)}; give the column {named}, or complete it"
            )
        if _is_missing(row[field]) and not (field == text and may_be_empty):
            raise MisconfigurationException(f"{place}: {field!r} is empty; complete it, or remove the row")
    written = "" if _is_missing(row[text]) else row[text]
    if not isinstance(written, str):
        raise MisconfigurationException(f"{place}: {text!r} is {type(written).__name__}, and must be text")
    about = None if _is_missing(row.get(film)) else str(row[film])
    review = Review(written, _label(row[label], place, classes) if classes else None, about, place)
    if not (review.text or may_be_empty):
        raise MisconfigurationException(f"{place}: the review is empty; remove it")
    return review


def _label(given: Any, place: str, classes: Sequence[str]) -> int:
    """Return the index of a label, which is the name of a class or its index; `1` and `"1"` mean the same.

    If a class has the index of another one as its name, a label must be a name: `1` could mean either.
    """
    indices = [str(index) for index in range(len(classes))]
    only_names = any(name in indices and name != index for index, name in zip(indices, classes, strict=True))
    label = _written(given)
    if label in classes:
        return classes.index(label)
    if label in indices and not only_names:
        return indices.index(label)
    numbers = "" if only_names else f"0 to {len(classes) - 1} or "
    advice = "; --data.reviews.classes null finds the classes" if tuple(classes) == CLASSES else ""
    raise MisconfigurationException(
        f"{place}: the label is {given!r}, and must be {numbers}one of {', '.join(classes)}{advice}"
    )


def _is_missing(value: Any) -> bool:
    """Return whether a field has nothing in it: `None`, white space, or not a number (NaN), as tables have it."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _written(label: Any) -> str | None:
    """Return a label as the name of a class, without white space around it; `None` if it is missing, or a list."""
    return str(label).strip() if isinstance(label, str | int | float) and not _is_missing(label) else None


def _classes_of(rows: Iterable[Any], field: str, where: str) -> list[str]:
    """Return the labels in some rows as names of classes, in the order of their numbers or else of the alphabet."""
    given: set[str] = set()
    columns: dict[str, None] = {}  # in their order
    for row in filter(lambda row: isinstance(row, dict), rows):
        columns |= dict.fromkeys(row)
        if (label := _written(row.get(field))) is not None:
            given.add(label)
    if columns and field not in columns:
        raise MisconfigurationException(
            f"data.reviews: {where} has no column {field!r}, only {', '.join(map(repr, columns))}; name the column "
            "with the labels by datamodules.bert_imdb.ReviewFiles, its label_field, and classes null"
        )
    if not 2 <= len(given) <= MOST_CLASSES:
        found = f"has the label{'s' * (len(given) != 1)} {', '.join(sorted(given))}" if given else "holds no label"
        found = f"has {len(given):,} different labels" if len(given) > MOST_CLASSES else found
        raise MisconfigurationException(
            f"data.reviews: the column {field!r} of {where} {found}; a classifier needs 2 to {MOST_CLASSES} classes: "
            "choose another column by datamodules.bert_imdb.ReviewFiles, its label_field, and classes null"
        )
    return sorted(given, key=(lambda label: (int(label), label)) if all(map(str.isdecimal, given)) else None)


def read_reviews(
    file: str, classes: Sequence[str] | None = CLASSES, may_be_empty: bool = False, **fields: str
) -> Iterator[tuple[Review, dict[str, Any]]]:
    """Yield the reviews of a file, each with its row: a table, JSON lines or Parquet, see `rows_of` and `parse_review`.

    A column after a colon, as in `mine.csv:message`, is that of the text.

    Raises:
        MisconfigurationException: If the file is missing, or a line is not a review; the message has its number.
    """
    path, column = split_column(file)
    fields |= {"text": column} if column else {}
    for place, row in rows_of(Path(path).expanduser()):
        yield parse_review(row, place, classes, may_be_empty=may_be_empty, **fields), row


class ReviewFiles(PartedSource):
    """Files of JSON lines (`.jsonl`), tables (`.csv`, `.tsv`) or Parquet; the first two may be compressed.

    A column after a colon, as in `mine.csv:message`, is that of the text in place of `text_field`.

    Args:
        train: File, or files, to train on.
        val: File, or files, to validate on; `null` holds out a part of `train`.
        test: File, or files, to test on; `null` holds out a part of `train`.
        unlabelled_file: File of reviews without labels, to pretrain on; `null` for none.
        val_fraction: Fraction of `train` that is held out for validation, in [0, 1); no film is in two splits.
        test_fraction: Fraction of `train` that is held out for the test, in [0, 1).
        text_field: Name of the field, or column, with the text.
        label_field: Name of the field with the label: the name of a class or, unless a class has the index of another
            one as its name, its index.
        film_field: Name of the field with the film; it may be missing.
        classes: Names of the classes, at least two; `null` means the labels of `train`, sorted.
        exact: Whether exactly the fractions are held out. If not, they are the probability of each film, or of each
            text without a film, whose split then does not depend on the others.

    Raises:
        MisconfigurationException: If the fractions leave nothing to train on, or there are fewer than two classes.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        unlabelled_file: str | None = None,
        val_fraction: Probability = 0.1,
        test_fraction: Probability = 0.1,
        text_field: str = "text",
        label_field: str = "label",
        film_field: str = "film",
        classes: list[str] | tuple[str, ...] | None = CLASSES,
        exact: bool = False,
    ) -> None:
        given = {"train": train, "val": val, "test": test, "unlabelled": unlabelled_file}
        self.parts = {name: [files] if isinstance(files, str) else files for name, files in given.items() if files}
        self.fractions = require_fractions(0.0 if val else val_fraction, 0.0 if test else test_fraction, "data.reviews")
        self.fields = {"text": text_field, "label": label_field, "film": film_field}
        if classes is not None and (len(set(classes)) < 2 or len(set(classes)) != len(classes)):
            raise MisconfigurationException(f"data.reviews: classes must be two or more names, got {list(classes)}")
        self.given_classes, self.exact = classes, exact

    def find_classes(self) -> list[str]:
        """Return the labels of the files to train on, sorted."""
        files = [Path(split_column(file)[0]).expanduser() for file in self.parts["train"]]
        label = self.fields["label"]
        rows = (row for file in files for _, row in rows_of(file, columns=[label]))
        return _classes_of(rows, label, ", ".join(map(str, files)))

    def flags_to_hold_out(self, split: Side, named: bool) -> str | None:
        """Return the flags of `fit` that hold out a larger part of the files to train on."""
        if split == "train" or split in self.parts:
            return None
        train = as_flag(self.parts["train"])
        files = f"--data.reviews ReviewFiles --data.reviews.train {train} --data.reviews.classes null "
        return f"{'' if named else files}--data.reviews.{split}_fraction 0.3"

    def read(self, part: list[str], classes: Sequence[str] | None) -> Iterator[Review]:
        """Yield the reviews of some files."""
        for file in part:
            yield from (review for review, _ in read_reviews(file, classes, may_be_empty=False, **self.fields))


class AclImdb(PartedSource):
    """The folder `aclImdb` of the original data set (Maas et al., 2011, https://ai.stanford.edu/~amaas/data/sentiment).

    Args:
        folder: Folder that contains `train/` and `test/`.
        val_fraction: Fraction of the training films that is held out for validation, in [0, 1).
    """

    def __init__(self, folder: str, val_fraction: Probability = 0.1) -> None:
        self.folder = Path(folder).expanduser()
        self.parts = {part: (f"{part}/neg", f"{part}/pos") for part in ("train", "test")}
        self.parts["unlabelled"] = ("train/unsup",)
        self.fractions = val_fraction, 0.0

    def read(self, part: tuple[str, ...], classes: Sequence[str] | None) -> Iterator[Review]:
        """Yield the reviews of some folders, each ordered by the numbers of its files.

        Raises:
            MisconfigurationException: If a folder is missing, or a review is empty or not UTF-8.
        """
        for label, name in enumerate(part):
            folder = self.folder / name
            if not folder.is_dir():
                raise MisconfigurationException(
                    f"{folder} does not exist: give the folder aclImdb, unpacked from aclImdb_v1.tar.gz"
                )
            urls = folder.with_name(f"urls_{folder.name}.txt")  # line i is the film of review i, counted from 0
            films = dict(enumerate(_text_of(urls).split("\n"))) if urls.is_file() else {}
            files = [(int(found[1]), file) for file in folder.iterdir() if (found := _ACL_FILE.fullmatch(file.name))]
            for number, file in sorted(files):
                row = {"text": _text_of(file), "label": label, "film": films.get(number)}
                yield parse_review(row, str(file), classes)


def _text_of(file: Path) -> str:
    return "".join(decoded(file, str(file)))


class HubReviews(PartedSource):
    """A Hugging Face dataset with a text and the field `label`.

    Args:
        dataset: Name on the hub (`owner/name`), or a local folder with data files.
        train: Name of the split to train on.
        val: Name of the split to validate on; `null` holds out a part of the training split.
        test: Name of the split to test on.
        unlabelled_split: Name of a split to pretrain on, whose labels are ignored; `null` for none.
        val_fraction: Fraction of the training split that is held out for validation, in [0, 1). The hub's copy of IMDB
            does not name the films, so the splits may share films, but no text.
        classes: Names of the classes; `null` means the labels of the split to train on, sorted.
        revision: Branch, tag or commit of the dataset.
        text_field: Name of the field with the text.
    """

    def __init__(
        self,
        dataset: str = "stanfordnlp/imdb",
        train: str = "train",
        val: str | None = None,
        test: str = "test",
        unlabelled_split: str | None = "unsupervised",
        val_fraction: Probability = 0.1,
        classes: list[str] | tuple[str, ...] | None = CLASSES,
        revision: str | None = None,
        text_field: str = "text",
    ) -> None:
        self.dataset = dataset
        names = {"train": train, "val": val, "test": test, "unlabelled": unlabelled_split}
        self.parts = {split: name for split, name in names.items() if name}
        self.fractions = 0.0 if val else val_fraction, 0.0
        self.text_field, self.given_classes = text_field, classes
        self.revision = revision

    def find_classes(self) -> list[str]:
        """Return the labels of the split to train on, sorted."""
        return _classes_of(self._load(self.parts["train"]), "label", f"dataset {self.dataset}")

    def prepare(self) -> None:
        """Download the dataset."""
        self._load(self.parts["train"])

    def read(self, part: str, classes: Sequence[str] | None) -> Iterator[Review]:
        """Yield the reviews of a split of the dataset."""
        for number, row in enumerate(self._load(part)):
            yield parse_review(row, f"dataset {self.dataset}, {part}, row {number}", classes, self.text_field)

    def _load(self, split: str) -> Any:
        advice = "datamodules.bert_imdb.ReviewFiles and experiments/bert_imdb/offline.yaml need no network"
        return load_hub_dataset(self.dataset, split, revision=self.revision, advice=advice)
