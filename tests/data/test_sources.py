"""Sources of text: files, URLs, hub datasets and the documentation of Python."""

import http.server
import os
import socket
import threading
import tracemalloc
from functools import partial
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import sources
from datamodules.sources import HubText, ListText, Piece, PythonText, TextFiles, cut


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
