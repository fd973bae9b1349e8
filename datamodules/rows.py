"""Rows of text files, JSON lines or tables, with the file and the line in every error."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.common.messages import first_line

csv.field_size_limit(2**31 - 1)  # characters; by default, a text of 131,073 is an error


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each line of a file of JSON lines, optionally compressed (`.gz`).

    The file is in UTF-8. A byte order mark and empty lines are skipped.

    Raises:
        MisconfigurationException: If the file cannot be read, or a line is not JSON or holds what is not text.
    """
    for number, line in _lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise MisconfigurationException(f"{place}: is no JSON object on one line ({error})") from error
            if "\\u" in line:
                check_characters(json.dumps(row, ensure_ascii=False), place)
            yield place, row


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the fields by column of each row of a table with commas (`.csv`, or `.csv.gz`).

    The file is in UTF-8, its first line names the columns. A byte order mark and empty lines are skipped.

    Raises:
        MisconfigurationException: If the file cannot be read, or a row does not fit the columns.
    """
    reader = csv.reader(line for _, line in _lines(path))
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise MisconfigurationException(f"{path}, line 1: two columns have the same name ({', '.join(columns)})")
        if len(columns) == 1 and (other := next((sign for sign in ";\t|" if sign in columns[0]), None)):
            raise MisconfigurationException(
                f"{path}, line 1: one column, {columns[0]!r}; separate the columns with commas, not with {other!r}"
            )
        begins = reader.line_num + 1  # a text may span several lines
        for row in reader:
            if row and len(row) != len(columns):
                raise MisconfigurationException(
                    f"{path}, line {begins}: {len(row)} columns, where the first line names {len(columns)}; put text "
                    "with commas in quotation marks"
                )
            if row:
                yield f"{path}, line {begins}", dict(zip(columns, row, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise MisconfigurationException(f"{path}, line {reader.line_num}: is no row of a table ({error})") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        raise MisconfigurationException(f"{path} does not exist: give a file of JSON lines, or a table (.csv)")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # Bytes that are not UTF-8 become surrogates, so that their line is known.
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            for number, line in enumerate(text, start=1):
                _check_decoded(line, f"{path}, line {number}")
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise MisconfigurationException(f"{path} could not be read: {first_line(error)}") from error


def _check_decoded(line: str, place: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) & 0xFF
        raise MisconfigurationException(
            f"{place}: is not UTF-8 (byte 0x{byte:02x} in column {error.start + 1}); convert the file with "
            "`iconv -t UTF-8`"
        ) from error


def check_characters(text: str, place: str) -> None:
    """Check that a text can be encoded.

    Raises:
        MisconfigurationException: If it has half of a surrogate pair; `place` says where the text is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise MisconfigurationException(
            f"{place}: a text has \\u{code:04x}, half of a surrogate pair, which is no character; remove it"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return row
