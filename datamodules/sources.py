"""Sources of text: files and URLs, the Hugging Face hub, the Python installation of this machine, or a list of texts.

A source yields its documents in pieces of bounded size, so that a corpus of any size fits into little memory. Where it
can, it cuts at the end of a line, see `cut`. The tokens of such pieces are the tokens of the document if the tokenizer
splits a text there, as that of GPT-2 does, and does not mark the beginning of a text, as many of SentencePiece do.
"""

import ast
import hashlib
import importlib
import math
import re
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.cache import digest
from datamodules.files import (
    JSON_LINES,
    LINE_START,
    READ_ERRORS,
    ROWS,
    TEXT,
    decoded,
    download,
    ending_of,
    find_files,
    identity_of,
    is_compressed,
    is_url,
    safe_cuts,
    split_column,
)
from datamodules.hub_datasets import hub_errors, load_hub_dataset
from datamodules.rows import check_characters, text_column, texts_of_rows
from lightning_modules.common.messages import first_line
from lightning_modules.common.ranges import NonNegativeInt, PositiveInt

# Characters. A tokenizer needs up to a hundred bytes of memory for each, and encodes several pieces at once.
PIECE_SIZE = 2**16

# Files, or a downloaded dataset, of more bytes than a part are prepared in parts, at most that many; a stream, of any
# size, in its files or their row groups. A process that is killed loses the part that it prepares.
PART_SIZE = 2**25
MOST_PARTS = 512

SHUFFLED_SIZE = 2**27  # characters of documents that are shuffled together


class Piece(NamedTuple):
    """A part of a document, and whether it is the last."""

    text: str
    ends_document: bool


class Source(ABC):
    """Base of the sources: a collection of documents that can be read repeatedly, always in the same order."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Yield every document in pieces of at most `PIECE_SIZE` characters."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that changes when the text changes."""

    def parts(self) -> Sequence["Source"]:
        """Return sources whose documents, one source after the other, are those of this one.

        A large text has many parts, of which each can be read alone. They depend on the text only, so that several
        processes agree.
        """
        return [self]

    def opening(self) -> str:
        """Return the beginning of the document in which this part of a text begins; empty if a document begins."""
        return ""

    def documents(self) -> Iterator[str]:
        """Yield every document whole."""
        parts: list[str] = []
        for text, ends_document in self.pieces():
            parts.append(text)
            if ends_document:
                yield "".join(parts)
                parts = []


# What a datamodule accepts as its text; see `source_of`.
AnySource = Source | str | list[str] | Path

HUB = "hub:"
_CLASS_PATH = re.compile(r"([a-z_]\w*\.)+[A-Z]\w*")  # no file has a name such as datamodules.sources.PythonText


def source_of(text: AnySource, where: str = "data.source") -> Source:
    """Return the source that a setting names.

    Args:
        text: A source; `hub:OWNER/NAME` or `hub:OWNER/NAME:COLUMN`, a Hugging Face dataset; or paths, see `Files`.
        where: The path of the setting in the configuration, for error messages.

    Raises:
        MisconfigurationException: If it is empty, or names a class that does not exist.
    """
    if isinstance(text, Source):
        return text
    if (name := hub_name(text, where)) is not None:
        dataset, _, column = name.partition(":")
        return HubText(dataset, column=column or HubText.column)
    paths = paths_of(text, where)
    return Files(paths if isinstance(text, list) else paths[0])


def hub_name(text: str | list[str] | Path, where: str) -> str | None:
    """Return what follows `hub:` in a setting, or `None` if it names files.

    Raises:
        MisconfigurationException: If no name of a dataset follows.
    """
    if not isinstance(text, str) or not text.startswith(HUB):
        return None
    name = text.removeprefix(HUB)
    if not name.partition(":")[0]:
        raise MisconfigurationException(f"{where}: {text!r} names no dataset; give hub:OWNER/NAME")
    return name


def paths_of(text: str | list[str] | Path, where: str) -> list[str]:
    """Return the paths and URLs that a setting names.

    Raises:
        MisconfigurationException: If it is empty, or names a class that does not exist or a dataset among files.
    """
    paths = text if isinstance(text, list) else [str(text)]
    if not paths or not all(paths):
        raise MisconfigurationException(f"{where} is empty: give a file, a folder, a glob pattern or a URL")
    for path in paths:
        if path.startswith(HUB):
            raise MisconfigurationException(f"{where}: {path} is in a list; give one dataset of the hub, or only files")
        if _CLASS_PATH.fullmatch(path) and not Path(path).exists():
            raise MisconfigurationException(
                f"{where}: {path} is neither a file nor a class of sources; the classes are in datamodules.sources: "
                f"{', '.join(_names_of_sources())}"
            )
    return paths


def _names_of_sources(base: type = Source) -> Iterator[str]:
    """Yield the names of the public classes of this file that are derived from a class."""
    for kind in base.__subclasses__():
        if kind.__module__ == __name__ and not kind.__name__.startswith("_"):
            yield kind.__name__
        yield from _names_of_sources(kind)


def local_files_of(text: str | list[str] | Path, where: str) -> list[str]:
    """Return the files of this machine that a setting names, for rows that are read in place.

    Raises:
        MisconfigurationException: If it names none, or a URL; see `paths_of` too.
    """
    paths = paths_of(text, where)
    if url := next(filter(is_url, paths), None):
        raise MisconfigurationException(f"{where}: {url} is a URL; download it, and give the path of the file")
    return [name for path in paths for name in find_files(path)]


def cut(chunks: Iterable[str], ends_document: bool = True) -> Iterator[Piece]:
    """Cut one document, given as consecutive strings of any length, into pieces of at most `PIECE_SIZE` characters.

    A cut is made after the last newline that has a non-space character on both sides; if there is none, after the last
    newline; if a line is longer than a piece, within the line.

    Args:
        chunks: The document.
        ends_document: Whether the last piece is the last of the document.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > PIECE_SIZE:
            end = _last_cut(rest, start, start + PIECE_SIZE)
            yield Piece(rest[start:end], False)
            start = end
        rest = rest[start:]
    if rest:
        yield Piece(rest, ends_document)


def _last_cut(text: str, start: int, limit: int) -> int:
    newline = text.rfind("\n", start, limit)
    while newline > start:
        if LINE_START.match(text, newline - 1):
            return newline + 1
        newline = text.rfind("\n", start, newline)
    return text.rfind("\n", start, limit) + 1 or limit


class FileRange(NamedTuple):
    """A file or URL, or the bytes of it from `begin` to `end`; the column of the text if the file has rows."""

    name: str
    column: str | None = None
    begin: int = 0
    end: int | None = None

    def path(self) -> Path:
        """Return the path of the file on this machine; download it if it is a URL."""
        return download(self.name) if is_url(self.name) else Path(self.name)


@dataclass
class Files(Source):
    """Files of text or of rows, local or remote: a text file is one document, and so is each row of the others.

    The ending of a file says how it is read: JSON lines (`.jsonl`, `.ndjson`, `.json`, the last also with one list),
    tables (`.csv`, `.tsv`), Parquet (`.parquet`), and any other as UTF-8 text; each but Parquet may be compressed
    (`.gz`, `.bz2`, `.xz`, `.zst`). The text of a row is in the column `text`, or in the only column that holds text.
    Rows without text and empty files are skipped.

    Args:
        paths: A file, a folder (its `.txt`, `.text`, `.md`, `.markdown` and `.rst` files and those with rows, also in
            subfolders), a glob pattern (`books/**/*.py`), a URL that fsspec supports (`https://`, `s3://`, ...), or a
            list of these. A column after a colon chooses it: `reviews.csv:content`. Relative paths start at the
            working folder.
    """

    paths: str | list[str]

    _row_endings = ROWS  # of the files that have rows

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents in pieces, decoded as they are read."""
        is_empty = True
        for piece in chain.from_iterable(map(self.read, self._files())):
            is_empty = False
            yield piece
        if is_empty:
            paths = self.paths if isinstance(self.paths, str) else ", ".join(self.paths)
            raise MisconfigurationException(f"{paths} is empty: give a file that holds text")

    def read(self, text: FileRange) -> Iterator[Piece]:
        """Yield the documents of a file, or of a range of it, in pieces."""
        path, bounds = text.path(), (text.begin, text.end)
        try:
            if self.has_rows(text):
                for document in texts_of_rows(path, text.column, *bounds):
                    yield from cut([document])
            else:
                yield from cut(decoded(path, text.name, True, *bounds), ends_document=text.end is None)
        except READ_ERRORS as error:
            raise MisconfigurationException(f"{text.name} could not be read ({first_line(error)})") from error

    def has_rows(self, text: FileRange) -> bool:
        """Return whether a file has rows, each of which is a document."""
        return ending_of(text.name) in self._row_endings

    def parts(self) -> Sequence[Source]:
        """Return ranges of large files of text or JSON lines, and several small files together."""
        return _parts_of(self, self._files())

    def fingerprint(self) -> str:
        """Return a hash of the paths and contents of the files, of the URLs, and of the columns."""
        return digest([type(self).__name__, [[_identity(file.name), file.column] for file in self._files()]])

    def _files(self) -> list[FileRange]:
        paths = [self.paths] if isinstance(self.paths, str) else self.paths
        split = [split_column(path) if self._row_endings else (path, None) for path in paths]
        endings = TEXT + self._row_endings
        return [FileRange(name, column) for path, column in split for name in find_files(path, endings)]


class TextFiles(Files):
    """UTF-8 text files, local or remote: each file is one document, whatever its ending.

    A byte order mark is dropped and every line end becomes a newline. A URL is downloaded once, into the cache. Empty
    files are skipped.

    Args:
        paths: A path, a folder (its `.txt`, `.text`, `.md`, `.markdown` and `.rst` files, also in subfolders), a glob
            pattern, a URL, or a list of these, in the order of the documents.
    """

    _row_endings = ()


@dataclass
class _PartOfFiles(Source):
    """Ranges of the files of a source; `first` is the first range of the file of which another one begins the part."""

    whole: Files
    ranges: list[FileRange]
    first: FileRange
    whole_fingerprint: Callable[[], str] = field(compare=False)

    def pieces(self) -> Iterator[Piece]:
        return chain.from_iterable(map(self.whole.read, self.ranges))

    def opening(self) -> str:
        begins = self.whole.has_rows(self.first) or self.first == self.ranges[0]
        return "" if begins else next(self.whole.read(self.first)).text

    def fingerprint(self) -> str:
        ranges = [[_path(name), *rest] for name, *rest in self.ranges]
        return digest([self.whole_fingerprint(), ranges])


def _parts_of(source: Files, files: list[FileRange]) -> Sequence[Source]:
    sizes = [file.path().stat().st_size for file in files]
    wanted = max(PART_SIZE, sum(sizes) // MOST_PARTS)
    whole_fingerprint = cache(source.fingerprint)  # of all files, and so computed once for all parts
    parts: list[_PartOfFiles] = []
    filled = wanted  # bytes of the last part
    for file, size in zip(files, sizes, strict=True):
        ranges = _ranges_of(source, file, -(-size // wanted))
        for part in ranges:
            if filled >= wanted or part.begin:
                parts.append(_PartOfFiles(source, [], ranges[0], whole_fingerprint))
                filled = 0
            parts[-1].ranges.append(part)
            filled += (size if part.end is None else part.end) - part.begin
    return parts if len(parts) > 1 else [source]


def _ranges_of(source: Files, file: FileRange, n: int) -> list[FileRange]:
    """Return at most `n` ranges that are a file, in which lines of rows stay whole."""
    path, has_rows = file.path(), source.has_rows(file)
    if n < 2 or is_compressed(path) or (has_rows and ending_of(file.name) not in JSON_LINES):
        return [file]
    if has_rows and file.column is None:
        file = file._replace(column=text_column(path))
    begins = [0, *safe_cuts(path, n)]
    return [file._replace(begin=begin, end=end) for begin, end in zip(begins, [*begins[1:], None], strict=True)]


def _path(name: str) -> str:
    return name if is_url(name) else str(Path(name).resolve())


def _identity(name: str) -> str | list[str]:
    return name if is_url(name) else identity_of(Path(name))


@dataclass
class HubText(Source):
    """A text column of a Hugging Face dataset: each row is one document.

    Args:
        dataset: Name on the hub (`owner/name`), or a local folder with data files.
        config: Configuration (subset), for a dataset that has several.
        split: Name of the split.
        column: Name of the column.
        streaming: Whether to read rows over the network as they are needed. If not, the dataset is downloaded first.
        max_documents: Number of documents to read from the start; `null` for all.
        revision: Branch, tag or commit. With a commit, the run can be repeated after the dataset has changed.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = True
    max_documents: PositiveInt | None = None
    revision: str | None = None

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows in pieces. Rows without text are skipped."""
        return self.read()

    def read(self, part: int = 0, n_parts: int = 1) -> Iterator[Piece]:
        """Yield the rows of one of several consecutive parts in pieces."""
        rows = self._rows
        with hub_errors(self.dataset, self.split, self.config):
            if n_parts > 1:
                rows = rows.shard(n_parts, part, contiguous=True)
            columns = rows.column_names or list(next(iter(rows), {}))  # some streams have no column names
            if not columns:  # nor rows: an empty file
                return
            if self.column not in columns:
                raise MisconfigurationException(
                    f"dataset {self.dataset} has no column {self.column}: choose one of {', '.join(columns)}, as in "
                    f"hub:{self.dataset}:{columns[0]}"
                )
            for number, row in enumerate(islice(rows.select_columns([self.column]), self.max_documents)):
                text = row[self.column]
                if not isinstance(text, str | None):
                    kind, of = type(text).__name__, f" of part {part} of {n_parts}" if n_parts > 1 else ""
                    raise MisconfigurationException(
                        f"dataset {self.dataset}, row {number}{of}: column {self.column} holds {kind}, not text"
                    )
                yield from cut([text or ""])

    @cached_property
    def _rows(self) -> Any:
        """The rows, loaded once; a stream in parts that are as small as its files allow."""
        rows = load_hub_dataset(self.dataset, self.split, self.config, self.revision, self.streaming)
        with hub_errors(self.dataset, self.split, self.config):
            small = not self.streaming or self.max_documents or rows.num_shards >= MOST_PARTS
            return rows if small or not hasattr(rows, "reshard") else rows.reshard()  # datasets 4.0 has none

    def parts(self) -> Sequence[Source]:
        """Return groups of the files of a stream, or of their row groups, or of the rows of a dataset on the disk."""
        if self.max_documents is not None:
            return [self]
        rows, whole_fingerprint = self._rows, cache(self.fingerprint)
        n = min(rows.num_shards if self.streaming else min(rows.data.nbytes // PART_SIZE, len(rows)), MOST_PARTS)
        return [_PartOfDataset(self, part, n, whole_fingerprint) for part in range(n)] if n > 1 else [self]

    def fingerprint(self) -> str:
        """Return a hash of the arguments, and of the paths and contents of local files."""
        folder = Path(self.dataset)
        files = [identity_of(path) for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else []
        asked = [self.dataset, self.config, self.split, self.column, self.max_documents, self.revision]
        return digest(["HubText", asked, files])


@dataclass
class _PartOfDataset(Source):
    """Consecutive rows of a dataset."""

    whole: HubText
    part: int
    n_parts: int
    whole_fingerprint: Callable[[], str] = field(compare=False)

    def pieces(self) -> Iterator[Piece]:
        return self.whole.read(self.part, self.n_parts)

    def fingerprint(self) -> str:
        rows = self.whole._rows
        divided = ["shards", rows.num_shards] if self.whole.streaming else ["rows", len(rows)]
        return digest([self.whole_fingerprint(), divided, self.part, self.n_parts])


PythonKind = Literal["topics", "docstrings", "modules", "tests"]

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}  # the last repeats the topics


@dataclass
class PythonText(Source):
    """Documentation and source code of the running Python: English text and code that every machine has.

    Only the module with the help topics is imported. The documents have a fixed order, and equal texts occur once.

    Args:
        kinds: Kinds of text, in the order in which they are read: `topics` (the pages of `help("topic")`), `docstrings`
            (of the standard library, each one document), `modules` (source files of the library, with docstrings),
            `tests` (source files of its tests; some installations have none).
    """

    kinds: list[PythonKind] | tuple[PythonKind, ...] = ("topics", "docstrings")

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents in pieces."""
        readers: dict[PythonKind, Callable[[], Iterator[str]]]
        readers = {"topics": _topics, "docstrings": _docstrings, "modules": _modules, "tests": partial(_modules, True)}
        seen: set[bytes] = set()
        for text in chain.from_iterable(readers[kind]() for kind in self.kinds):
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                yield from cut([text])
        if not seen:
            raise MisconfigurationException(
                f"{sys.executable} has no {' or '.join(self.kinds)} installed: ask for other `kinds`"
            )

    def fingerprint(self) -> str:
        """Return a hash of the version and the folder of Python, and of the arguments."""
        return digest(["PythonText", sys.version, sysconfig.get_path("stdlib"), self.kinds])


def _topics() -> Iterator[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some systems have it in a separate package
        return
    yield from (topics[name] for name in sorted(topics))


def _modules(tests: bool = False) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        folders = set(path.relative_to(root).parts[:-1])
        if folders & _FOREIGN_FOLDERS or bool(folders & _TEST_FOLDERS) != tests:
            continue
        try:
            with tokenize.open(path) as file:  # reads with the encoding that the file declares
                yield file.read()
        except (SyntaxError, UnicodeDecodeError):  # some files for tests are invalid on purpose
            continue


def _docstrings() -> Iterator[str]:
    for text in _modules():
        yield from _docstrings_of(ast.parse(text))


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module, class or function and of the definitions in it, in the order of the source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
        yield docstring
    for block in ("body", "handlers", "orelse", "finalbody"):  # expressions, most of the tree, have none
        for statement in getattr(node, block, ()):
            yield from _docstrings_of(statement)


@dataclass
class ListText(Source):
    """Texts given as a list, which is in memory and is hashed whole."""

    texts: list[str]

    def __post_init__(self) -> None:
        for number, text in enumerate(self.texts):
            check_characters(text, f"text {number} of the list")

    def pieces(self) -> Iterator[Piece]:
        """Yield the texts in pieces."""
        for text in self.texts:
            yield from cut([text])

    def fingerprint(self) -> str:
        """Return a hash of the texts."""
        return digest(["ListText", self.texts])


@dataclass
class Mixture(Source):
    """Several texts, of which pretraining takes shares by weight; elsewhere, one after the other.

    An epoch has no window twice, and is as long as the text allows that is the first to be used up. The others go on in
    the next epoch, so that each is read to its end before any of it is repeated.

    Args:
        sources: The texts: sources, files, folders, glob patterns, URLs or `hub:OWNER/NAME`, at least 2.
        weights: Share of each in the training windows, more than 0; `[3, 1]` and `[0.75, 0.25]` mean the same.

    Raises:
        MisconfigurationException: If a weight is missing, or is not more than 0, or a text is a mixture itself.
    """

    sources: list[AnySource]
    weights: list[float]

    def __post_init__(self) -> None:
        if len(self.sources) < 2 or len(self.weights) != len(self.sources):
            raise MisconfigurationException(
                f"data.source: a mixture of {len(self.sources)} sources has {len(self.weights)} weights; give two "
                "sources or more, and a weight for each"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise MisconfigurationException(f"data.source: the weights {self.weights} must all be more than 0")
        self.texts = [source_of(text, f"data.source.sources[{i}]") for i, text in enumerate(self.sources)]
        if any(isinstance(text, Mixture) for text in self.texts):
            raise MisconfigurationException(
                "data.source: a text of a mixture is a mixture, whose weights would be lost: give all texts to one"
            )

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents of the texts one after the other."""
        return chain.from_iterable(text.pieces() for text in self.texts)

    def fingerprint(self) -> str:
        """Return a hash of the texts and their weights."""
        return digest(["Mixture", [text.fingerprint() for text in self.texts], self.weights])


@dataclass
class Shuffled(Source):
    """The documents of a text in random order, in place of one in which neighbours may belong together.

    Windows are shuffled anyway; what they hold is what follows one another in the text, such as the pages of one site.
    The documents of a part of a large text (32 MiB, or more if there would be over 512 parts; a file or row group of a
    dataset that is streamed) are shuffled among themselves, in memory, at most 134 million characters at a time. A
    document that is longer, or begins in an earlier part, keeps its place.

    Args:
        source: The text: a source, files, a folder, a glob pattern, URLs or `hub:OWNER/NAME`.
        seed: Seed of the order, 0 or greater.

    Raises:
        MisconfigurationException: If the text is a mixture, each text of which can be shuffled.
    """

    source: AnySource
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        self.text = source_of(self.source, "data.source.source")
        if isinstance(self.text, Mixture):
            raise MisconfigurationException(
                "data.source: a mixture is not shuffled as a whole: give it texts that are each a Shuffled"
            )

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents, those of each part shuffled."""
        return chain.from_iterable(map(self._shuffled, self.text.parts()))

    def parts(self) -> Sequence[Source]:
        """Return the parts of the text, each of them shuffled."""
        parts = self.text.parts()
        return [Shuffled(part, self.seed) for part in parts] if len(parts) > 1 else [self]

    def opening(self) -> str:
        """Return the beginning of the document in which the text begins."""
        return self.text.opening()

    def fingerprint(self) -> str:
        """Return a hash of the text and the seed."""
        return digest(["Shuffled", self.text.fingerprint(), self.seed])

    def _shuffled(self, part: Source) -> Iterator[Piece]:
        draw = np.random.default_rng(self.seed)
        documents: list[list[Piece]] = []  # that are complete
        document: list[Piece] = []  # that has begun
        stays = bool(part.opening())  # whether it keeps its place
        size = 0

        def held() -> Iterator[Piece]:
            yield from chain.from_iterable(documents[i] for i in draw.permutation(len(documents)))
            yield from document  # it goes on after these

        for piece in part.pieces():
            if stays:
                yield piece
                stays = not piece.ends_document
                continue
            document.append(piece)
            size += len(piece.text)
            if piece.ends_document:
                documents.append(document)
                document = []
            if size >= SHUFFLED_SIZE:
                yield from held()
                documents, document, size, stays = [], [], 0, bool(document)
        yield from held()
