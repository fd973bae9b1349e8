"""Files that are complete or absent: each is written under a temporary name and then renamed."""

import contextlib
import csv
import fcntl
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")

_Value = TypeVar("_Value", dict[str, Any], list[Any])


@contextmanager
def naming(place: Path, own: Path | None = None) -> Iterator[None]:
    """Give errors of files without a name, such as that of a full disk, the name of a file or folder.

    Args:
        place: The file or folder.
        own: File whose name is replaced by that of `place` too.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(own)):
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file that replaces the target when the block ends; create missing parent folders."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(target, own=temporary):
            with open(temporary, "wb") as file:
                yield file
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of a folder that processes left which were killed; none may be writing there."""
    for file in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(file.name):
            file.unlink(missing_ok=True)


class FileLock:
    """A lock of a file, which ends when it is closed or the process ends.

    Args:
        opened: The file.
        is_exclusive: Whether no other process can have it; a file system without locks gives one to every process.
    """

    def __init__(self, opened: TextIO, is_exclusive: bool) -> None:
        self._opened = opened
        self.is_exclusive = is_exclusive

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the lock."""
        self._opened.close()


def process_name(number: int) -> str:
    """Return the name of a process of this machine in a file that it has locked."""
    return f"process {number} on {socket.gethostname()}"


def try_lock(file: Path) -> FileLock | None:
    """Lock a file for this process, whose name it then holds, or return `None` if another process has locked it."""
    is_exclusive = True
    while True:
        opened = file.open("a+")
        try:
            # A lock of fcntl is not inherited by forked processes, and works on NFS.
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            opened.close()
            return None
        except OSError:  # a file system without locks
            is_exclusive = False
            break
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_ino == os.fstat(opened.fileno()).st_ino:
                break
        opened.close()  # the holder has just removed the file
    opened.truncate(0)
    opened.write(f"{process_name(os.getpid())}\n")
    opened.flush()
    return FileLock(opened, is_exclusive)


def link_or_copy(source: Path, target: Path) -> None:
    """Make the target a second name of a file, replacing it at once; a copy where a file cannot have two names."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:  # some file systems have no hard links
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Create or replace a UTF-8 text file."""
    with atomic_file(target) as file:
        file.write(text.encode("utf-8"))


def read_json(file: Path, empty: _Value) -> _Value:
    """Return the content of a JSON file, or `empty` if there is no such file.

    Raises:
        OSError: If it cannot be read, or its content is of another type than `empty`.
    """
    if not file.is_file():
        return empty
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"{file} is damaged ({error}): remove it, or restore it from a copy") from error
    if not isinstance(value, type(empty)):
        raise OSError(f"{file} is damaged (it holds no {type(empty).__name__}): remove it, or restore it from a copy")
    return value


def complete_lines(file: Path) -> list[str]:
    """Return the complete lines of a text file; a process may have written half of another one."""
    return file.read_text(encoding="utf-8").split("\n")[:-1]


def write_json(target: Path, value: Any, indent: int | None = 2) -> None:
    """Create or replace a JSON file; numbers that JSON does not have, which are not finite, become null."""
    write_text(target, json.dumps(_with_nulls(value), indent=indent, allow_nan=False) + "\n")


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unused(path: Path) -> Path:
    """Return a path, or if something is there, the first that is not: `a.csv`, `a.2.csv`, `a.3.csv`."""
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(2))
    return next(found for found in itertools.chain([path], numbered) if not os.path.lexists(found))


def write_csv(target: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Create or replace a CSV file with the names of the columns in the first line."""
    write_text(target, csv_text(columns, rows))


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]], is_foreign: bool = False) -> str:
    """Return a CSV table as text.

    Args:
        columns: Names of the columns, the first line.
        rows: Values of each further line.
        is_foreign: Whether the table has texts of strangers: a spreadsheet would compute one that begins as a formula,
            so such a text begins with an apostrophe.
    """
    text = io.StringIO()
    lines: Iterable[Sequence[Any]] = itertools.chain([columns], rows)
    if is_foreign:
        lines = ([_without_formula(value) for value in line] for line in lines)
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _without_formula(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def replace_folder(target: Path, fill: Callable[[Path], Any]) -> None:
    """Create or replace a folder; `fill` creates and fills the folder whose path it gets."""
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with naming(target):
            fill(fresh)
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # of one that failed
