"""Rows of JSON lines and tables: odd but legal files are read, others are one line with the place."""

import gzip
import json
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import rows
from datamodules.files import open_bytes
from datamodules.rows import json_rows, parquet_rows, table_rows, texts_of_rows

ROW = {"text": "Étude № 1, 学習\u2028so \u200b", "n": 1}


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + json.dumps(ROW, ensure_ascii=False),  # a byte order mark
        json.dumps(ROW) + "\r\n\r\n",
        "\n \n" + json.dumps(ROW),
        json.dumps(ROW) + " " * 100_000,
        json.dumps(ROW | {"n": {"deep": [1, {"er": None}]}}),
        json.dumps(ROW | {"text": "\U0001f600 \0"}),  # a whole surrogate pair, and a zero byte
    ],
)
def test_odd_json_lines_are_read(content):
    Path("a.jsonl").write_text(content, encoding="utf-8", newline="")
    Path("a.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    ((place, row),) = json_rows(Path("a.jsonl"))
    assert place.startswith("a.jsonl, line ")
    assert row == json.loads(content.removeprefix("\ufeff"))
    assert [row for _, row in json_rows(Path("a.jsonl.gz"))] == [row]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "\\ud83d"}', r"line 2: a text has \\ud83d, half of a surrogate pair"),
        (b'{"\\uDC00": 1}', r"line 2: a text has \\udc00"),
        ("café".encode("latin-1"), r"line 2: is not UTF-8 \(byte 0xe9 in column 4\); convert"),
        (b'{"a": 1, "a": 2}', "line 2: is no JSON object on one line .it has 'a' twice"),
        (b'{"a": "\0"}', "line 2: is no JSON object"),
        (b"[" * 100_000, "line 2: is no JSON object"),
        (b"1" * 5000, "line 2: is no JSON object"),
        (b"{", "line 2: is no JSON object"),
    ],
)
def test_a_line_that_is_not_json_is_named(content, message):
    Path("a.jsonl").write_bytes(b"{}\n" + content + b"\n{}\n")
    with pytest.raises(MisconfigurationException, match=f"^a.jsonl, {message}"):
        list(json_rows(Path("a.jsonl")))


def test_a_list_is_read_once_and_checked_for_characters_only_where_it_escapes_some(monkeypatch):
    Path("a.json").write_text(json.dumps([ROW, ROW], ensure_ascii=False, indent=1), encoding="utf-8")
    opened, checked = [], []
    monkeypatch.setattr(rows, "open_bytes", lambda path, *bounds: opened.append(path) or open_bytes(path, *bounds))
    monkeypatch.setattr(rows, "check_characters", lambda text, place: checked.append(place))
    assert list(json_rows(Path("a.json"))) == [("a.json, item 1", ROW), ("a.json, item 2", ROW)]
    assert (opened, checked) == ([Path("a.json")], [])
    Path("a.json").write_text(json.dumps([ROW]))
    assert list(json_rows(Path("a.json"))) == [("a.json, item 1", ROW)]
    assert checked == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\r\n\n [1,\n 2,,\n 3]\n", r"a.json: is no list in JSON \(.*: line 4 column 4 \(char 11\)\)"),
        (b'\n["\\ud83d"]', r"a.json: a text has \\ud83d, half of a surrogate pair"),
        (b'["a",\n"\xe9"]', r"a.json, line 2: is not UTF-8"),
    ],
)
def test_an_error_in_a_list_has_its_place(content, message):
    Path("a.json").write_bytes(content)
    with pytest.raises(MisconfigurationException, match=f"^{message}"):
        list(json_rows(Path("a.json")))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_file_in_another_encoding_is_named(encoding):
    Path("a.jsonl").write_bytes('{"é": 1}'.encode(encoding))
    with pytest.raises(MisconfigurationException, match=r"^a.jsonl, line 1: is no"):
        list(json_rows(Path("a.jsonl")))


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ('\ufefftext,label\n"a, ""b""\nc",1\n', {"text": 'a, "b"\nc', "label": "1"}),
        ("text,label\r\na,1\r\n\r\n", {"text": "a", "label": "1"}),
        ("text,label\ra,1", {"text": "a", "label": "1"}),
        ("text,label\n" + "a" * 200_000 + ",1", {"text": "a" * 200_000, "label": "1"}),
        ("text,label\na\u2028b\x0bc,", {"text": "a\u2028b\x0bc", "label": ""}),
        ('label,text\r\n1,"a ""b""\r\nc"\r\n', {"label": "1", "text": 'a "b"\r\nc'}),
        ('label,text\n1,a "b" c"\n', {"label": "1", "text": 'a "b" c"'}),
    ],
)
def test_odd_tables_are_read(content, row):
    Path("a.csv").write_text(content, encoding="utf-8", newline="")
    assert list(table_rows(Path("a.csv"))) == [("a.csv, line 2", row)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text;label\na;1\n", "line 1: one column, 'text;label'; separate the columns with commas, not with ';'"),
        (b"text,text\na,1\n", "line 1: two columns have the same name"),
        (b"text,label\na,1\nb\n", "line 3: 1 columns, where the first line names 2"),
        (b'text,label\n"a,1\nb,1\n', r"line 2: is no row of a table \(unexpected end"),
        (b'label,text\n0,"a\nb"\n1,"a\n0,b\n0,c\n', "line 4: is no row of a table .*; put a text that begins with a"),
        (b'label,text\n1,"Good" film\n0,b\n', "line 2: is no row of a table .',' expected"),
        (b'"text\na\n', "line 1: is no row of a table"),
        (b"text,label\na,1\nb,\xe9\n", "line 3: is not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_by_its_line(content, message):
    Path("a.csv").write_bytes(content)
    with pytest.raises(MisconfigurationException, match=f"^a.csv, {message}"):
        list(table_rows(Path("a.csv")))


def test_a_damaged_compressed_file_is_one_line():
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for content in (whole[: len(whole) // 2], whole[:-4], whole[:20] + b"xxxx" + whole[24:], b"{}"):
        Path("a.jsonl.gz").write_bytes(content)
        with pytest.raises(MisconfigurationException, match=r"^a.jsonl.gz could not be read: \w+"):
            list(json_rows(Path("a.jsonl.gz")))


def write_parquet(columns):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), "a.parquet")
    return Path("a.parquet")


def test_of_a_parquet_file_only_the_column_of_the_text_is_read(monkeypatch):
    import pyarrow
    from pyarrow import parquet

    path = write_parquet({"content": ["one", None], "vector": [[1.0], [2.0]], "n": [1, 2]})
    columns = []
    whole = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda self, *args, **kwargs: (columns.append(kwargs["columns"]), whole(self, *args, **kwargs))[1],
    )
    assert list(texts_of_rows(path, "content")) == ["one"]
    assert list(texts_of_rows(path)) == ["one"]
    assert columns == [["content"], None, ["content"]]  # where it is not known, that of the first row
    with pytest.raises(MisconfigurationException, match="no column 'text', only 'content', 'vector', 'n'"):
        list(texts_of_rows(path, "text"))
    assert list(texts_of_rows(write_parquet({"text": pyarrow.array([], pyarrow.string())}))) == []


def test_text_of_a_parquet_file_that_is_not_utf8_is_one_line():
    import pyarrow

    texts = pyarrow.array([b"fine"] * 1500 + [b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    path = write_parquet({"text": texts})
    for read in (texts_of_rows, parquet_rows):
        with pytest.raises(MisconfigurationException, match=r"^a.parquet could not be read as Parquet after row 1,024"):
            list(read(path))
