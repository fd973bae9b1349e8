"""Rows of JSON lines, tables and Parquet files, with the file and the line in every error."""

import csv
import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.files import READ_ERRORS, ending_of, open_bytes
from lightning_modules.common.messages import first_line

_SEPARATORS = {".csv": ",", ".tsv": "\t"}

csv.field_size_limit(2**31 - 1)  # characters; by default, a text of 131,073 is an error


def rows_of(
    path: Path, begin: int = 0, end: int | None = None, columns: Collection[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each row of a file, as its ending says.

    A table has the ending `.csv` or `.tsv`, a Parquet file `.parquet`; others have JSON lines. All but Parquet files
    may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). The lines of JSON from byte `begin` to `end` can be read alone. If
    a Parquet file has all of the given columns, it is read without the others.

    Raises:
        MisconfigurationException: If the file or a row cannot be read.
    """
    ending = ending_of(path.name)
    if ending == ".parquet":
        return parquet_rows(path, columns)
    if ending in _SEPARATORS:
        return table_rows(path)
    return json_rows(path, begin, end)


def texts_of_rows(path: Path, column: str | None = None, begin: int = 0, end: int | None = None) -> Iterator[str]:
    """Yield the text of each row of a file that has some.

    Args:
        path: The file, see `rows_of`.
        column: Name of the column; by default `text`, or else the only column of the first row that holds text.
        begin: First byte of the rows.
        end: Byte after the last.

    Raises:
        MisconfigurationException: If there is no such column, or it holds something else than text.
    """
    if column is None and ending_of(path.name) == ".parquet":
        column = text_column(path)
    for place, row in rows_of(path, begin, end, [column] if column else []):
        if not isinstance(row, dict):
            raise MisconfigurationException(f"{place}: is {type(row).__name__}, and must be an object with a text")
        column = column or _text_column(row, path, place)
        if column not in row:
            raise MisconfigurationException(f"{place}: there is no column {column!r}, only {columns_of(row)}")
        if row[column] is not None and not isinstance(row[column], str):
            raise MisconfigurationException(f"{place}: {column!r} is {type(row[column]).__name__}, and must be text")
        if row[column]:
            yield row[column]


def text_column(path: Path) -> str | None:
    """Return the column that `texts_of_rows` reads by default; `None` if there is no row."""
    for place, row in rows_of(path):
        return _text_column(row, path, place) if isinstance(row, dict) else None
    return None


def _text_column(row: dict[str, Any], path: Path, place: str) -> str:
    if "text" in row:
        return "text"
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if len(columns) != 1:
        which = (
            f"give the one with the text, as in {path}:{columns[0]}" if columns else "none of its columns holds text"
        )
        raise MisconfigurationException(f"{place}: there is no column 'text', only {columns_of(row)}; {which}")
    return columns[0]


def columns_of(row: dict[str, Any]) -> str:
    """Return the names of the columns of a row as a message has them."""
    return ", ".join(map(repr, row)) or "nothing"


def parquet_rows(path: Path, columns: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the fields by column of each row of a Parquet file; see `rows_of`.

    Raises:
        MisconfigurationException: If the file cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            read = [*columns] if columns and set(columns) <= set(file.schema_arrow.names) else None
            for batch in file.iter_batches(1024, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # the last of text that is not UTF-8
        where = f" after row {number:,}" if number else ""
        raise MisconfigurationException(f"{path} could not be read as Parquet{where}: {first_line(error)}") from error


def json_rows(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each line of a file of JSON lines, which may be compressed.

    The file is in UTF-8. A byte order mark and empty lines are skipped. A file with the ending `.json` may also hold
    one list of values, on any number of lines.

    Raises:
        MisconfigurationException: If the file cannot be read, or a line is not JSON or holds what is not text.
    """
    if ending_of(path.name) == ".json" and (values := _json_list(path)) is not None:
        yield from ((f"{path}, item {number}", value) for number, value in enumerate(values, start=1))
        return
    for place, line in _lines(path, begin, end):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise MisconfigurationException(f"{place}: is no JSON object on one line ({error})") from error
            if "\\u" in line:
                check_characters(json.dumps(row, ensure_ascii=False), place)
            yield place, row


def _json_list(path: Path) -> list[Any] | None:
    """Return the values of a file that holds one list, or `None` if it begins otherwise."""
    lines = (line for _, line in _lines(path))
    text = ""
    while not text.strip() and (line := next(lines, "")):
        text += line  # empty lines too, so that an error in JSON has the right line
    if not text.lstrip().startswith("["):
        return None
    text += "".join(lines)
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise MisconfigurationException(f"{path}: is no list in JSON ({error})") from error
    if "\\u" in text:
        check_characters(json.dumps(values, ensure_ascii=False), str(path))
    return values


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the fields by column of each row of a table: with commas (`.csv`) or tabulators (`.tsv`).

    The file is in UTF-8, its first line names the columns. A byte order mark and empty lines are skipped. A field with
    separators or line ends is in quotation marks, and quotation marks within it are doubled.

    Raises:
        MisconfigurationException: If the file cannot be read, or a row does not fit the columns.
    """
    separator = _SEPARATORS[ending_of(path.name)]
    called = {",": "commas", "\t": "tabulators"}[separator]
    # Without `strict`, a quotation mark that nothing closes would make all following rows a part of its field.
    reader = csv.reader((line for _, line in _lines(path)), delimiter=separator, strict=True)
    begins = 1  # first line of the row that is read; a text may span several
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise MisconfigurationException(f"{path}, line 1: two columns have the same name ({', '.join(columns)})")
        if len(columns) == 1 and (other := next((sign for sign in ";\t|," if sign in columns[0]), None)):
            raise MisconfigurationException(
                f"{path}, line 1: one column, {columns[0]!r}; separate the columns with {called}, not with {other!r}"
            )
        begins = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(columns):
                raise MisconfigurationException(
                    f"{path}, line {begins}: {len(row)} columns, where the first line names {len(columns)}; put text "
                    f"with {called} in quotation marks"
                )
            if row:
                yield f"{path}, line {begins}", dict(zip(columns, row, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise MisconfigurationException(
            f"{path}, line {begins}: is no row of a table ({error}); put a text that begins with a quotation mark in "
            "quotation marks, and double those within it"
        ) from error


def _lines(path: Path, begin: int = 0, end: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each line."""
    after = f" after byte {begin}" if begin else ""
    if not path.is_file():
        raise MisconfigurationException(f"{path} does not exist: give a file of JSON lines, or a table (.csv, .tsv)")
    try:
        with open_bytes(path, begin, end) as file:
            # Bytes that are not UTF-8 become surrogates, so that their line is known.
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            for number, line in enumerate(text, start=1):
                place = f"{path}, line {number}{after}"
                _check_decoded(line, place)
                yield place, line
    except READ_ERRORS as error:
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
