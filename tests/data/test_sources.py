"""Sources of text: files, URLs, hub datasets and the documentation of Python."""

import bz2
import gzip
import http.server
import lzma
import os
import socket
import threading
import tracemalloc
from functools import partial
from itertools import chain
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import sources
from datamodules.files import find_files
from datamodules.sources import Files, HubText, ListText, Piece, PythonText, TextFiles, cut, source_of
from datamodules.token_cache import prepare_tokens
from datamodules.tokenizers import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def one_line_error(source):
    with pytest.raises(MisconfigurationException) as caught:
        list(source.pieces())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- pieces ----------------------------------------------------------------------------------------------------------


def cut_at(text, size):
    with mock.patch.object(sources, "PIECE_SIZE", size):
        return list(cut([text]))


def test_cuts_after_the_last_newline_between_non_spaces():
    assert cut_at("ab\ncd\n\nef", 8) == [Piece("ab\n", False), Piece("cd\n\nef", True)]


def test_cuts_after_any_newline_where_there_is_no_better_one():
    assert cut_at("ab\n cd\n ef", 8) == [Piece("ab\n cd\n", False), Piece(" ef", True)]


def test_cuts_a_long_line_anywhere():
    assert [piece.text for piece in cut_at("abcdefghij", 4)] == ["abcd", "efgh", "ij"]


def test_a_document_of_exactly_one_piece_is_not_cut():
    assert cut_at("abcd", 4) == [Piece("abcd", True)]


@given(st.lists(st.text(alphabet="ab \n\t\u3000é"), max_size=8), st.integers(1, 9))
@settings(deadline=None)
def test_pieces_are_bounded_and_join_to_the_documents(texts, size):
    with mock.patch.object(sources, "PIECE_SIZE", size):
        source = ListText(texts)
        assert all(0 < len(piece.text) <= size for piece in source.pieces())
        assert list(source.documents()) == [text for text in texts if text]


@given(st.text(alphabet="ab \n", min_size=1), st.lists(st.integers(0, 60), max_size=5))
@settings(deadline=None)
def test_cuts_do_not_depend_on_how_the_text_arrives(text, places):
    ends = sorted(min(place, len(text)) for place in places)
    chunks = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    with mock.patch.object(sources, "PIECE_SIZE", 7):
        assert list(cut(chunks)) == list(cut([text]))


# --- TextFiles -------------------------------------------------------------------------------------------------------


def test_files_come_in_the_order_given_and_globs_sorted(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    source = TextFiles([str(tmp_path / "c.txt"), str(tmp_path / "[ab].txt")])
    assert list(source.documents()) == ["c", "a", "b"]


def test_byte_order_mark_and_carriage_returns_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_SIZE", 4)
    file = tmp_path / "dos.txt"
    file.write_bytes("\ufeffé\r\nb\r\n\ufeff".encode())
    assert list(TextFiles(str(file)).documents()) == ["é\nb\n\ufeff"]


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"a" * (2**20 - 1), "é".encode() * 2**20 + b"x"])
def test_text_that_is_not_utf8_names_the_byte(tmp_path, before):
    file = tmp_path / "latin.txt"
    file.write_bytes(before + b"caf\xc3\xa9 caf\xe9 au lait")
    message = one_line_error(TextFiles(str(file)))
    assert f"byte {len(before) + 9} " in message
    assert "latin.txt is not UTF-8" in message


def test_text_that_ends_inside_a_character_names_the_byte(tmp_path):
    file = tmp_path / "torn.txt"
    file.write_bytes(b"a" * 2**20 + "é".encode()[:1])
    assert f"byte {2**20} " in one_line_error(TextFiles(str(file)))


def test_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf")
    assert "missing.txt not found" in one_line_error(TextFiles(str(tmp_path / "missing.txt")))
    assert "*.md not found" in one_line_error(TextFiles(str(tmp_path / "*.md")))
    assert "empty.txt is empty" in one_line_error(TextFiles(str(tmp_path / "empty.txt")))


def test_the_constructor_reads_nothing():
    TextFiles("missing.txt")
    HubText("nobody/nothing")


def test_fingerprint_follows_content_that_changes_within_size_and_modification_time(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one")
    os.utime(file, (1, 1))
    before = TextFiles(str(file)).fingerprint()
    file.write_text("two")
    os.utime(file, (1, 1))
    assert TextFiles(str(file)).fingerprint() != before


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "text [v2].txt").write_text("one")
    (tmp_path / "text v.txt").write_text("two")
    assert list(TextFiles(str(tmp_path / "text [v2].txt")).documents()) == ["one"]
    assert list(TextFiles(str(tmp_path / "text [v].txt")).documents()) == ["two"]


def test_fingerprint_follows_the_file(tmp_path):
    file, copy = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("one")
    copy.write_text("one")
    before = TextFiles(str(file)).fingerprint()
    assert TextFiles([str(file)]).fingerprint() == before
    assert TextFiles(str(copy)).fingerprint() != before
    file.write_text("three")
    assert TextFiles(str(file)).fingerprint() != before


def test_a_large_file_is_never_in_memory_whole(tmp_path):
    file = tmp_path / "large.txt"
    file.write_bytes(b"The quick brown fox.\n" * 2_000_000)  # 42 MB
    tracemalloc.start()
    n_characters = sum(len(piece.text) for piece in TextFiles(str(file)).pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_characters == 42_000_000
    assert peak < 10e6


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): ...

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served"))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "served"
        server.shutdown()


def test_a_url_is_downloaded_once(server, cache):
    url, folder = server
    (folder / "text.txt").write_text("from afar\n" * 20_000)
    source = TextFiles(f"{url}/text.txt")
    before = source.fingerprint()
    assert list(source.documents()) == ["from afar\n" * 20_000]
    (folder / "text.txt").unlink()
    assert list(source.documents()) == ["from afar\n" * 20_000]
    assert source.fingerprint() == before
    assert len(list((cache / "downloads").iterdir())) == 1


def test_a_url_that_is_not_there_leaves_nothing_in_the_cache(server, cache):
    url, _ = server
    message = one_line_error(TextFiles(f"{url}/nothing.txt"))
    assert "nothing.txt could not be downloaded" in message
    assert not list(cache.rglob("*nothing*"))


def test_a_server_that_cannot_be_reached_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/text.txt"
    message = one_line_error(TextFiles(url))
    assert url in message
    assert "give the path of the file" in message


# --- Files, and what a setting names ---------------------------------------------------------------------------------

ROWS_OF_TEXT = {
    "a.jsonl": '{"text": "one", "n": 1}\n{"text": null}\n{"text": "two\\nlines"}\n',
    "b.json": '\ufeff[\n  {"text": "one"},\n  {"text": "two\\nlines"}\n]\n',
    "c.json": '{"content": "one", "n": 1}\n{"content": "two\\nlines", "n": 2}\n',
    "d.csv": 'id,text\n1,one\n2,"two\nlines"\n',
    "e.tsv": 'text\tid\none\t1\n"two\nlines"\t2\n',
}


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
COMPRESSED_ROWS = [f"{name}{ending}" for name in ROWS_OF_TEXT for ending in COMPRESSIONS]


@pytest.fixture
def files(tmp_path):
    """A folder with the same two texts in every form of rows, and with text files."""
    from pyarrow import Table, parquet

    for name, content in ROWS_OF_TEXT.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        for ending, compress in COMPRESSIONS.items():
            (tmp_path / f"{name}{ending}").write_bytes(compress(content.encode()))
    parquet.write_table(
        Table.from_pydict({"text": ["one", None, "two\nlines"], "n": [1, 2, 3]}), tmp_path / "f.parquet"
    )
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress("\ufeffone\r\ntwo".encode()))
    (tmp_path / "books/deep").mkdir(parents=True)
    (tmp_path / "books/.venv").mkdir()
    for name in ("b.txt", "a.md", "deep/c.TXT", ".hidden.txt", ".venv/f.txt", "d.py", "e.png", "empty.txt"):
        (tmp_path / "books" / name).write_text("" if name == "empty.txt" else name)
    return tmp_path


@pytest.mark.parametrize("name", [*ROWS_OF_TEXT, *COMPRESSED_ROWS, "f.parquet"])
def test_each_row_is_a_document(files, name):
    assert list(source_of(name).pieces()) == [Piece("one", True), Piece("two\nlines", True)]


def test_a_column_is_chosen_after_a_colon(files):
    (files / "g.jsonl").write_text('{"a": "one", "b": "two"}\n')
    (files / "odd:a.txt").write_text("a file of this name")
    assert list(source_of("g.jsonl:b").documents()) == ["two"]
    assert list(source_of(["g.jsonl:a", "g*.jsonl:b"]).documents()) == ["one", "two"]
    assert list(source_of("odd:a.txt").documents()) == ["a file of this name"]
    assert source_of("g.jsonl:a").fingerprint() != source_of("g.jsonl:b").fingerprint()


@pytest.mark.parametrize(
    ("given", "documents"),
    [
        ("books", ["a.md", "b.txt", "deep/c.TXT"]),
        ("books/", ["a.md", "b.txt", "deep/c.TXT"]),
        ("books/*.py", ["d.py"]),
        ("books/**/*.[tT]*", ["b.txt", "deep/c.TXT"]),
        (["books/d.py", "books/a.md"], ["d.py", "a.md"]),
        (Path("books/.hidden.txt"), [".hidden.txt"]),
        ("g.txt.gz", ["one\ntwo"]),
    ],
)
def test_paths_folders_and_patterns_are_sources(files, given, documents):
    assert list(source_of(given).documents()) == documents


def test_a_folder_and_a_pattern_follow_links_and_read_each_folder_once(tmp_path):
    for name in ("data/a.txt", "data/deep/b.txt", "other/c.txt", "other/.hidden/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name, target in (
        ("data/deep/loop", "data"),
        ("data/linked", "other"),
        ("data/again", "other"),
        ("other/back", "data"),
        ("data/file.txt", "data/a.txt"),
        ("data/.hidden", "other"),
    ):
        (tmp_path / name).symlink_to(tmp_path / target)
    (tmp_path / "data/lost.txt").symlink_to(tmp_path / "lost")
    found = ["data/a.txt", "other/c.txt", "data/deep/b.txt", "data/a.txt"]
    for path in ("data", "data/**/*.txt", "d*/**/*.txt", "data/**", "**/data/**/*.txt"):
        assert list(source_of(path).documents()) == found


def test_text_files_of_a_folder_are_not_its_tables(files):
    assert list(TextFiles("books").documents()) == ["a.md", "b.txt", "deep/c.TXT"]
    (files / "books/f.csv").write_text("text\na row\n")
    (files / "books/G.TXT.GZ").write_bytes(gzip.compress(b"compressed"))
    assert list(TextFiles("books").documents()) == ["compressed", "a.md", "b.txt", "deep/c.TXT"]
    assert list(TextFiles("books/*.csv").documents()) == ["text\na row\n"]
    assert list(Files("books").documents()) == ["compressed", "a.md", "b.txt", "deep/c.TXT", "a row"]
    (files / "rows").mkdir()
    (files / "rows/a.csv").write_text("text\na row\n")
    assert "holds no text: none of its 1 files ends in .txt, .text, .md, .markdown, .rst;" in one_line_error(
        TextFiles("rows")
    )


def test_fingerprints_are_those_of_earlier_versions():
    assert ListText(["a"]).fingerprint() == "19f18eec4f09cb8f9f3d"
    assert HubText("owner/name", max_documents=3).fingerprint() == "2da5353a68e6a94cbf32"


def test_what_a_setting_names():
    source = ListText(["a"])
    assert source_of(source) is source
    assert source_of("hub:nobody/nothing") == HubText("nobody/nothing")
    assert source_of("hub:nobody/nothing:content") == HubText("nobody/nothing", column="content")
    assert source_of("https://x.org/a.jsonl:content") == Files("https://x.org/a.jsonl:content")


BAD = {  # what a source names, the content of a file of this name, and the message
    "empty.txt": (b"\xef\xbb\xbf", "empty.txt is empty: give a file that holds text"),
    "empty.jsonl": (b"\n\n", "empty.jsonl is empty"),
    "binary.bin": (bytes(range(256)), "binary.bin is not UTF-8: byte 128 cannot be decoded .*it is a binary file"),
    "zero.bin": (bytes(5000), "zero.bin is no text: it has zero bytes"),
    "u.txt": ("some text".encode("utf-16"), "u.txt is not UTF-8: .*it is UTF-16: convert it with `iconv -f UTF-16"),
    "le.txt": ("some text".encode("utf-16-le"), "le.txt is no text: it has zero bytes, as .* UTF-16 has"),
    "lost.txt": (None, "text file lost.txt not found"),
    "*.lost": (None, r"text file \*.lost not found"),
    "folder": (None, "folder folder holds no text: none of its 1 files ends in .txt, .*give a glob pattern"),
    "a.jsonl": (b'{"a": "x", "b": "y"}', "line 1: there is no column 'text', only 'a', 'b'; .* as in a.jsonl:a"),
    "b.jsonl": (b'{"a": 1}', "line 1: there is no column 'text', only 'a'; none of its columns holds text"),
    "c.jsonl:x": (b'{"a": "x"}', "c.jsonl, line 1: there is no column 'x', only 'a'"),
    "d.jsonl": (b'{"text": "a"}\n{"text": 1}', "line 2: 'text' is int, and must be text"),
    "e.jsonl": (b'["a"]', "e.jsonl, line 1: is list, and must be an object"),
    "f.json": (b'[{"text": "a"}', "f.json: is no list in JSON"),
    "g.csv": (b"text;n\na;1\n", "g.csv, line 1: one column, 'text;n'; separate the columns with commas, not with ';'"),
    "h.tsv": (b"text,n\na,1\n", "h.tsv, line 1: one column, 'text,n'; separate the columns with tabulators, not"),
    "i.parquet": (b"PAR1 and no more", "i.parquet could not be read as Parquet"),
    **{
        f"j.txt{ending}": (compress(b"text" * 99)[:-9], f"j.txt{ending} could not be read")
        for ending, compress in COMPRESSIONS.items()
    },
    **{
        f"k.txt{ending}": (compress(b"a\xff"), f"k.txt{ending} is not UTF-8: byte 1 cannot be decoded")
        for ending, compress in COMPRESSIONS.items()
    },
    "hub:": (None, "data.source: 'hub:' names no dataset; give hub:OWNER/NAME"),
    "hub:nobody/nothing": (None, "dataset nobody/nothing .* could not be read"),
    "": (None, "data.source is empty: give a file"),
    "datamodules.sources.PythonTxt": (
        None,
        "is neither a file nor a class of sources; the classes are in datamodules.sources: Files, TextFiles, HubText, "
        "PythonText, ListText, Mixture, Shuffled$",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.png").touch()
    if content is not None:
        (tmp_path / name.removesuffix(":x")).write_bytes(content)
    with pytest.raises(MisconfigurationException, match=message) as caught:
        list(source_of(name).pieces())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [["dataset_dict.json"], ["dataset_info.json", "state.json"]])
def test_a_folder_of_save_to_disk_names_what_to_write(tmp_path, files):
    (tmp_path / "saved").mkdir()
    for file in files:
        (tmp_path / "saved" / file).write_text("{}")
    assert "folder saved is of `save_to_disk` of the library datasets; write it as Parquet" in one_line_error(
        Files("saved")
    )


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
def test_a_folder_with_a_file_of_rows_of_any_name_is_read(tmp_path, name):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / name).write_text('[{"text": "one"}]')
    assert [*Files("notes").pieces()] == [Piece("one", True)]


@pytest.mark.parametrize("given", [[], [""], ["a.txt", "hub:nobody/nothing"]])
def test_a_list_that_names_no_files_is_refused(given):
    with pytest.raises(MisconfigurationException, match=r"^data.val_source"):
        source_of(given, "data.val_source")


@pytest.mark.parametrize("content", [b"abc", b"one line", b"a b\r\nc\r\n", b"\n"])
def test_short_texts_are_texts(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert list(source_of("a.txt").documents()) == [content.decode().replace("\r", "")]


def test_the_hash_of_a_large_file_is_kept_until_the_file_changes(tmp_path, cache, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("text")
    before = TextFiles(str(file)).fingerprint()
    monkeypatch.setattr("datamodules.files._LARGE", 4)
    assert TextFiles(str(file)).fingerprint() == before
    assert not (cache / "hashes").exists()  # the file has just been written
    monkeypatch.setattr("datamodules.files._SETTLED", -1)
    assert TextFiles(str(file)).fingerprint() == before
    with mock.patch("hashlib.file_digest", side_effect=AssertionError):
        assert TextFiles(str(file)).fingerprint() == before
    state = file.stat()
    file.write_text("next")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert TextFiles(str(file)).fingerprint() != before
    for kept in (cache / "hashes").iterdir():
        kept.write_text("damaged")
    file.write_text("text")
    assert TextFiles(str(file)).fingerprint() == before


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(sources, "PART_SIZE", 50)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab \n\r\té終\u3000", max_size=60), min_size=1, max_size=4))
def test_the_parts_of_files_are_the_whole(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("parts")
    for number, one in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(("\ufeffx" + one).encode())
    with mock.patch.object(sources, "PART_SIZE", 20):
        parts = Files(str(folder)).parts()
        again = [list(part.pieces()) for part in parts]
    whole = list(Files(str(folder)).documents())
    pieces = list(chain.from_iterable(again))
    assert "".join(text for text, _ in pieces) == "".join(whole)
    assert sum(ends_document for _, ends_document in pieces) == len(whole) == len(texts)
    begins = True
    for part, pieces in zip(parts, again, strict=True):
        assert begins == (not part.opening())
        begins = pieces[-1].ends_document


def test_a_text_is_cut_at_lines_and_files_that_cannot_be_cut_stay_whole(small_parts):
    lines = "".join(f"line {number}\n" for number in range(40))
    Path("a.txt").write_text(lines)
    with gzip.open("b.txt.gz", "wt") as file:
        file.write(os.urandom(100).hex())
    Path("c.csv").write_text("text\n" + lines)
    rows = "".join(f'{{"text": "row {number}", "other": "x"}}\n' for number in range(40))
    Path("d.jsonl").write_text(rows)
    assert len(source_of("a.txt").parts()) == 7
    assert all(next(part.pieces()).text.startswith("line ") for part in source_of("a.txt").parts())
    relative, absolute = (source_of(path).parts() for path in (Path("a.txt"), Path("a.txt").absolute()))
    assert [part.fingerprint() for part in relative] == [part.fingerprint() for part in absolute]
    assert len({part.fingerprint() for part in relative}) == 7
    assert [len(source_of(name).parts()) for name in ("b.txt.gz", "c.csv")] == [1, 1]
    parts = source_of("d.jsonl:other").parts()
    assert len(parts) > 10
    assert [text for part in parts for text in part.documents()] == ["x"] * 40
    assert len(TextFiles("d.jsonl").parts()) > 10
    assert "".join(text for part in TextFiles("d.jsonl").parts() for text, _ in part.pieces()) == rows
    several = source_of(["a.txt", "b.txt.gz", "c.csv", "d.jsonl"])
    assert [*chain.from_iterable(part.pieces() for part in several.parts())][-1] == Piece("row 39", True)


def test_parts_of_rows_share_the_column_of_the_first(small_parts):
    rows = ['{"a": "one", "n": 1}'] * 9 + ['{"a": "two", "b": "other"}'] * 9
    Path("a.jsonl").write_text("\n".join(rows))
    found = [text for part in source_of("a.jsonl").parts() for text in part.documents()]
    assert found == ["one"] * 9 + ["two"] * 9


def test_an_error_in_a_part_has_its_place(small_parts):
    Path("a.txt").write_bytes(b"some text\n" * 30 + b"\xe9\n")
    with pytest.raises(MisconfigurationException, match="byte 300 cannot be decoded"):
        list(source_of("a.txt").parts()[-1].pieces())
    Path("a.jsonl").write_text('{"text": "a"}\n' * 20 + "[\n")
    with pytest.raises(MisconfigurationException, match=r"a.jsonl, line 4 after byte 238: is no JSON object"):
        list(source_of("a.jsonl").parts()[-1].pieces())


# --- HubText ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = ['{"text": "one", "id": 1}', '{"text": null, "id": 2}', '{"text": "two\\nlines", "id": 3}']
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_are_documents(dataset, streaming):
    source = HubText(str(dataset), streaming=streaming)
    assert list(source.pieces()) == [Piece("one", True), Piece("two\nlines", True)]
    assert list(HubText(str(dataset), streaming=streaming, max_documents=1).documents()) == ["one"]


def test_empty_files_of_a_stream_are_skipped(dataset):
    (dataset / "train.jsonl").unlink()
    for number, content in enumerate(['[{"text": "one"}]', "", '[{"text": "two"}]']):  # lists have no column names
        (dataset / f"train-{number}.json").write_text(content)
    source = HubText(str(dataset))
    assert [list(part.documents()) for part in source.parts()] == [["one"], [], ["two"]]


@pytest.fixture
def many_files(dataset):
    """Return a dataset of seven Parquet files of three rows, each a row group."""
    import pyarrow
    from pyarrow import parquet

    (dataset / "train.jsonl").unlink()
    for number in range(7):
        rows = pyarrow.table({"text": [f"{number} {row}" for row in range(3)], "id": [1, 2, 3]})
        parquet.write_table(rows, dataset / f"train-{number}.parquet", row_group_size=1)
    return dataset


@pytest.mark.parametrize("most", [4, 7, 12, 512])
@pytest.mark.parametrize("streaming", [True, False])
def test_the_parts_of_a_dataset_are_its_files_row_groups_or_rows(many_files, streaming, most, monkeypatch):
    monkeypatch.setattr(sources, "MOST_PARTS", most)
    monkeypatch.setattr(sources, "PART_SIZE", 40)
    source = HubText(str(many_files), streaming=streaming)
    parts = [list(part.documents()) for part in source.parts()]
    assert list(chain.from_iterable(parts)) == [f"{number} {row}" for number in range(7) for row in range(3)]
    assert len(parts) == min(most, 21 if streaming else source._rows.data.nbytes // 40)
    assert all(part.opening() == "" for part in source.parts())
    assert len({part.fingerprint() for part in source.parts()}) == len(parts) > 1
    assert HubText(str(many_files), streaming=streaming, max_documents=3).parts()[1:] == []


def test_the_parts_of_a_split_do_not_depend_on_the_size_of_the_others(many_files, monkeypatch):
    from pyarrow import parquet, table

    parquet.write_table(table({"text": ["one", "two"], "id": [1, 2]}), many_files / "test.parquet")
    monkeypatch.setattr(sources, "PART_SIZE", 1)  # as of a split with few rows that are large
    parts = HubText(str(many_files), split="test", streaming=False).parts()
    assert [list(part.documents()) for part in parts] == [["one"], ["two"]]
    monkeypatch.setattr(sources, "PART_SIZE", 100)  # more than this split has
    assert len(HubText(str(many_files), split="test", streaming=False).parts()) == 1
    assert len(HubText(str(many_files), streaming=False).parts()) > 1


def test_a_preparation_that_goes_on_with_other_parts_has_the_whole_text(many_files, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_PARTS", 4)
    monkeypatch.setattr(sources, "PART_SIZE", 40)
    streamed, downloaded = (HubText(str(many_files), streaming=streaming) for streaming in (True, False))
    assert len(streamed.parts()) == len(downloaded.parts()) == 4  # of whole files, and of rows
    read = HubText.read

    def read_two(self, part, n_parts):
        if part == 2:
            raise MisconfigurationException("the network is gone")
        return read(self, part, n_parts)

    monkeypatch.setattr(HubText, "read", read_two)
    with pytest.raises(MisconfigurationException, match="the network is gone"):
        prepare_tokens(streamed, byte_tokenizer(), tmp_path / "cache")
    monkeypatch.setattr(HubText, "read", read)
    file = prepare_tokens(downloaded, byte_tokenizer(), tmp_path / "cache")["train"]
    assert len(file.files) == 4
    (tokens,) = file.open()[np.arange(file.n_tokens)[None]]
    assert bytes(np.where(tokens < 256, tokens, ord("|")).tolist()).decode().split("|") == list(streamed.documents())
    assert len(list((tmp_path / "cache/tokens").glob("*/*"))) == 2  # meta.json and one folder of parts


def test_an_error_in_a_part_of_a_dataset_names_the_part(many_files):
    part = HubText(str(many_files), column="id").parts()[2]
    with pytest.raises(MisconfigurationException, match="row 0 of part 2 of 21: column id holds int, not text"):
        list(part.pieces())


def test_a_missing_column_lists_those_there_are(dataset):
    message = one_line_error(HubText(str(dataset), column="content"))
    assert "no column content: choose one of" in message
    assert "text" in message
    assert "id" in message


def test_a_column_that_is_not_text_names_the_row(dataset):
    assert "row 0: column id holds int" in one_line_error(HubText(str(dataset), column="id"))


def test_a_missing_split_is_one_line(dataset):
    message = one_line_error(HubText(str(dataset), split="dev"))
    assert "split dev" in message


def test_the_fingerprint_of_a_dataset_follows_what_is_asked_for(dataset):
    prints = {HubText(str(dataset), **options).fingerprint() for options in ({}, {"column": "id"}, {"split": "dev"})}
    assert len(prints) == 3
    assert HubText(str(dataset)).fingerprint() in prints
    (dataset / "train.jsonl").write_text('{"text": "other"}\n')
    assert HubText(str(dataset)).fingerprint() not in prints


@pytest.mark.parametrize("streaming", [True, False])
def test_an_unreachable_hub_is_one_line_that_names_the_offline_yaml(monkeypatch, streaming):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    message = one_line_error(HubText("nobody/nothing", streaming=streaming))
    assert "dataset nobody/nothing" in message
    assert "offline.yaml of the topic needs no network" in message


# --- PythonText ------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of a few files in place of Python's own."""
    twice = 'raise SystemExit\n\ndef f():\n    """Function f."""\n\nif x:\n    def f():\n        """Function f."""\n'
    method = '    def m(self):\n        """Method m.\n\n        More.\n        """\n'
    files = {
        "b.py": '"""Module b."""\nclass C:\n    """Class C."""\n' + method,
        "a.py": twice,
        "package/copy.py": twice,
        "test/test_a.py": '"""A test."""\n',
        "package/tests/bad.py": "# coding: nonsense\n",
        "site-packages/foreign.py": '"""Foreign."""\n',
    }
    for name, text in files.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(text)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    return files


def test_modules_come_sorted_and_once(library):
    assert list(PythonText(["modules"]).documents()) == [library["a.py"], library["b.py"]]


def test_docstrings_are_found_without_importing(library):
    assert list(PythonText(["docstrings"]).documents()) == [
        "Function f.",
        "Module b.",
        "Class C.",
        "Method m.\n\nMore.",
    ]


def test_tests_are_a_kind_of_their_own_and_unreadable_files_are_passed_over(library):
    assert list(PythonText(["tests"]).documents()) == ['"""A test."""\n']


def test_a_python_without_its_tests_or_topics(library, tmp_path, monkeypatch):
    (tmp_path / "lib/test/test_a.py").unlink()
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    assert len(list(PythonText(["topics", "modules", "tests"]).documents())) == 2
    assert "has no topics or tests installed" in one_line_error(PythonText(["topics", "tests"]))


def test_topics_are_those_of_help():
    from pydoc_data.topics import topics

    texts = list(PythonText(["topics"]).documents())
    assert texts[0] == topics[min(topics)]
    assert set(texts) == set(topics.values())


def test_the_fingerprint_of_python_follows_the_kinds():
    assert PythonText(["topics"]).fingerprint() == PythonText(["topics"]).fingerprint()
    assert PythonText(["topics"]).fingerprint() != PythonText(["topics", "modules"]).fingerprint()


def test_a_folder_that_has_a_link_within_itself_is_read_by_its_own_name(tmp_path):
    for version in ("v1", "v2"):
        (tmp_path / "books" / version).mkdir(parents=True)
        (tmp_path / "books" / version / "a.txt").write_text("text")
    (tmp_path / "books/current").symlink_to("v2")
    expected = [str(tmp_path / f"books/{version}/a.txt") for version in ("v1", "v2")]
    assert find_files(str(tmp_path / "books")) == expected
    assert find_files(str(tmp_path / "books/**/*.txt")) == expected
