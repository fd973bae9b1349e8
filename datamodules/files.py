"""Files of text and of rows: finding them by path, folder, glob or URL, and decoding them."""

import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shlex
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlparse

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.cache import digest
from lightning_modules.common.cache import cache_root
from lightning_modules.common.files import atomic_file, write_text
from lightning_modules.common.messages import first_line, say

# Endings of the files that are read from a folder; each may be followed by one of COMPRESSED. A file that is named is
# read as text whatever its ending, unless it is one of ROWS.
TEXT: tuple[str, ...] = (".txt", ".text", ".md", ".markdown", ".rst")
JSON_LINES = (".jsonl", ".ndjson")
ROWS: tuple[str, ...] = (*JSON_LINES, ".json", ".csv", ".tsv", ".parquet")

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of files, all but the first of damaged compressed ones

_LARGE = 2**26  # bytes of a file whose hash is kept
_SETTLED = 60  # seconds since the last change of a file whose hash is kept
_CHUNK = 2**20  # characters that are decoded at once
_SAVED_TO_DISK = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # files of all splits, and of one
_BINARY = 0.01  # a text has no zero bytes; a file with a larger share of them in a chunk is refused

# GPT-like pre-tokenizers always split after such a newline. Other whitespace around a cut could be one token.
LINE_START = re.compile(r"\S\n(?=\S)")


def _open_zstd(path: Path) -> BinaryIO:
    return io.BufferedReader(cast(io.RawIOBase, _Zstd(path)))


class _Zstd(io.RawIOBase):
    """The bytes of a file that is compressed by zstd, for which Python has a module from 3.14 on."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
        self._n_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._stream.readinto(buffer)
        self._n_read += n
        return n

    def tell(self) -> int:
        return self._n_read

    def close(self) -> None:
        self._stream.close()
        super().close()


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def is_url(path: str) -> bool:
    """Return whether a string is a URL rather than a path."""
    return "://" in path


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, by its ending."""
    return path.suffix.lower() in COMPRESSED


def ending_of(name: str) -> str:
    """Return the ending of a file, a URL or a glob pattern in lower case, such as `.txt`; of `a.csv.gz`, `.csv`."""
    path = PurePosixPath(urlparse(name).path if is_url(name) else name)
    ending = path.suffix.lower()
    return PurePosixPath(path.stem).suffix.lower() if ending in COMPRESSED else ending


def split_column(path: str) -> tuple[str, str | None]:
    """Split `a.csv:content` into the path and the column; the column is `None` if the path names none."""
    file, _, column = path.rpartition(":")
    names_column = column and "/" not in column and ending_of(file) in ROWS and not Path(path).exists()
    return (file, column) if names_column else (path, None)


def find_files(path: str, endings: Sequence[str] = TEXT + ROWS) -> list[str]:
    """Return the files at a path, in the order of their names.

    Links to folders are followed; a folder that several of them lead to, or one within itself, is read once.

    Args:
        path: A file; a folder, whose files with certain endings are found in all its subfolders, but for hidden ones; a
            glob pattern (`books/**/*.txt`); or a URL, which is returned as it is.
        endings: Endings of the files of a folder.

    Raises:
        MisconfigurationException: If there is none.
    """
    if is_url(path):
        return [path]
    local = Path(path).expanduser()
    if local.is_dir():
        return _files_of(local, endings)
    is_pattern = glob.has_magic(str(local)) and not local.is_file()  # a name may have brackets
    names = sorted(set(_matches(str(local)))) if is_pattern else [str(local)]
    found = [name for name in names if Path(name).is_file()]
    if not found:
        raise MisconfigurationException(
            f"text file {path} not found (working folder: {Path.cwd()}): give the path of a file or folder, a glob "
            "pattern that matches files, or a URL"
        )
    return found


def _matches(pattern: str) -> Iterator[str]:
    """Yield what matches a glob pattern; `**` means any folders, see `_folders`: those of `glob` may never end."""
    stars = re.search(r"(?<![^/])\*\*(?![^/])", pattern)
    if stars is None:
        yield from glob.glob(pattern)
        return
    before, after = pattern[: stars.start()], pattern[stars.end() :].strip("/") or "*"
    for begin in glob.glob(before) if before else [""]:
        for folder in _folders(begin or "."):
            inside = folder if begin else folder.removeprefix(".").removeprefix("/")
            yield from _matches(os.path.join(glob.escape(inside), after))


def _folders(root: str) -> Iterator[str]:
    """Yield a folder and those in it that are not hidden, each once; those that only links lead to come last."""
    begins, seen = [root], set()
    while begins:
        for folder, inside, _ in os.walk(begins.pop(0)):
            if (real := os.path.realpath(folder)) in seen:
                inside.clear()
                continue
            seen.add(real)
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            begins += filter(os.path.islink, (os.path.join(folder, name) for name in inside))
            yield folder


def _files_of(folder: Path, endings: Sequence[str]) -> list[str]:
    if any(all((folder / name).is_file() for name in saved) for saved in _SAVED_TO_DISK):
        raise MisconfigurationException(
            f"folder {folder} is of `save_to_disk` of the library datasets; write it as Parquet and give that file: "
            "load_from_disk(FOLDER).to_parquet('FILE.parquet'), of a split if it has several"
        )
    names = list(_matches(f"{glob.escape(str(folder))}/**/*"))
    found = sorted(Path(name) for name in names if ending_of(name) in endings and os.path.isfile(name))
    if not found:
        n_files = sum(map(os.path.isfile, names))
        raise MisconfigurationException(
            f"folder {folder} holds no text: none of its {n_files} files ends in {', '.join(endings)}; for files with "
            f"other endings give a glob pattern, such as '{folder}/**/*.py'"
        )
    return list(map(str, found))


def identity_of(path: Path) -> list[str]:
    """Return the path and a hash of the content of a file.

    Hashing takes one to two seconds a gigabyte, so the hash of a large file is kept in the cache. It is used as long as
    the system has counted no change of the file: a user can set the time of the last modification, but not this one.
    """
    state = path.stat()
    name = digest([str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino])
    kept = cache_root() / "hashes" / name
    is_large = state.st_size >= _LARGE
    if is_large and kept.is_file() and re.fullmatch("[0-9a-f]{128}", known := kept.read_text()):
        return [str(path.resolve()), known]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "blake2b").hexdigest()
    # A file that is still written may change again within the resolution of its times.
    if is_large and time.time() - state.st_ctime > _SETTLED:
        with contextlib.suppress(OSError):  # a cache that cannot be written
            write_text(kept, found)
    return [str(path.resolve()), found]


def open_bytes(path: Path, begin: int = 0, end: int | None = None) -> BinaryIO:
    """Open a file, optionally one of `COMPRESSED`, to read its bytes, or those of a range of an uncompressed one."""
    if begin or end is not None:
        return io.BufferedReader(cast(io.RawIOBase, _Range(path, begin, end)))
    return COMPRESSED.get(path.suffix.lower(), partial(Path.open, mode="rb"))(path)


class _Range(io.RawIOBase):
    """The bytes of a file from `begin` to `end`, at their places in the file."""

    def __init__(self, path: Path, begin: int, end: int | None) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(begin)
        self._left = (path.stat().st_size if end is None else end) - begin

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(memoryview(buffer)[: self._left])
        self._left -= n
        return n

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def decoded(
    path: Path, name: str, refuse_binary: bool = False, begin: int = 0, end: int | None = None
) -> Iterator[str]:
    """Yield the text of a UTF-8 file, optionally one of `COMPRESSED`, in chunks.

    A byte order mark is dropped and every line end becomes a newline.

    Args:
        path: The file.
        name: Its name in error messages.
        refuse_binary: Whether to refuse a file with many zero bytes, which can be decoded but is no text.
        begin: First byte; see `open_bytes`.
        end: Byte after the last.

    Raises:
        MisconfigurationException: If it cannot be decoded.
    """
    with open_bytes(path, begin, end) as file:
        reader = io.TextIOWrapper(file, encoding="utf-8" if begin else "utf-8-sig")
        try:
            while text := reader.read(_CHUNK):
                if refuse_binary and text.count("\0") > _BINARY * len(text):
                    raise MisconfigurationException(
                        f"text file {name} is no text: it has zero bytes, as a program, an archive or UTF-16 has; give "
                        "its text in UTF-8"
                    )
                yield text
        except UnicodeDecodeError as error:
            byte = file.tell() - len(error.object) + error.start  # the object ends with the last byte read
            raise MisconfigurationException(
                f"text file {name} is not UTF-8: byte {byte} cannot be decoded ({error.reason}); {_advice(error)}"
            ) from error


def safe_cuts(path: Path, n: int) -> list[int]:
    """Return at most `n - 1` bytes at which a text file can be cut into about equal parts, in order.

    Each is the beginning of a line with a character other than whitespace on both sides of the line end before it: see
    `sources.cut`. A part without such a place is not cut, and is joined to the next.
    """
    size, found = path.stat().st_size, []
    with path.open("rb") as file:
        for k in range(1, n):
            place = size * k // n
            file.seek(place)
            line = file.readline(size * (k + 1) // n - place)  # its beginning may be within a character
            while place + len(line) < size * (k + 1) // n:
                place += len(line)
                before, line = line, file.readline(size * (k + 1) // n - place)
                around = (before[-8:] + line[:8]).decode(errors="replace").replace("\r\n", "\n")
                if LINE_START.search(around):
                    found.append(place)
                    break
    return found


def _advice(error: UnicodeDecodeError) -> str:
    if error.object.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"
    if b"\0" in error.object:
        return "it is a binary file: give its text, in a file of its own"
    return "convert it with `iconv -t UTF-8`"


def download(url: str) -> Path:
    """Return a local copy of the file at a URL, downloaded into the cache the first time."""
    target = cache_root() / "downloads" / f"{digest(url)}-{PurePosixPath(urlparse(url).path).name}"
    if not target.exists():
        import fsspec

        say(f"downloading {url} to {target}")
        # By default, aiohttp ignores the proxy variables of the environment.
        options = {"client_kwargs": {"trust_env": True}} if url.startswith("http") else {}
        try:
            with fsspec.open(url, "rb", **options) as remote, atomic_file(target) as local:
                shutil.copyfileobj(remote, local)
        except Exception as error:  # each file system has its own exceptions
            raise MisconfigurationException(
                f"{url} could not be downloaded ({first_line(error)}): check the network and the address, or download "
                "it elsewhere and give the path of the file in place of the URL"
            ) from error
    return target


def as_flag(files: Sequence[str]) -> str:
    """Return files as the value of a flag: a path, or several in JSON."""
    return shlex.quote(files[0] if len(files) == 1 else json.dumps(files))
