"""Questions about Python from its documentation: answers are word for word in the passages, splits share nothing."""

import json
import re
import sysconfig
from collections.abc import Container
from itertools import islice
from pathlib import Path

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.gpt2_webglm_qa import python_questions
from datamodules.gpt2_webglm_qa.cited_answers import Record
from datamodules.gpt2_webglm_qa.python_questions import (
    Entry,
    PythonQuestions,
    ask,
    ask_about_two,
    entries,
    sentences,
)
from lightning_modules.common.cache import cache_root
from lightning_modules.common.citation_marks import cited

SIDES = ("train", "val", "test")
STATED = re.compile(r"(?:It takes|It derives from|The default of) .*`")  # answers that are read off a signature


@pytest.fixture(scope="module")
def library() -> list[Entry]:
    """The documentation of the built-in objects and of the first modules of this Python's library."""
    return list(entries(40))


@pytest.fixture(scope="module")
def sides(library: list[Entry]) -> dict[str, list[Record]]:
    """The records of all splits."""
    made: dict[str, list[Record]] = {side: [] for side in SIDES}
    for side, record in PythonQuestions(val_fraction=0.15, test_fraction=0.15)._make(library):
        made[side].append(record)
    return made


def heading_of(passage: str, headings: Container[str]) -> str:
    """Return the heading at the beginning of a passage; a heading may contain colons."""
    return next(passage[: colon.start()] for colon in re.finditer(":", passage) if passage[: colon.start()] in headings)


def test_answers_are_word_for_word_in_the_passages_that_they_cite(library, sides):
    everything = [record for side in SIDES for record in sides[side]]
    assert len(everything) > 800
    assert min(len(sides["val"]), len(sides["test"])) > 50
    texts = {sentence.rstrip(".") for entry in library for sentence in entry.sentences}
    headings = {entry.heading for entry in library}
    n_stated = n_citing_two = 0
    for record in everything:
        assert 1 <= len(record.references) <= 3
        assert all(len(reference) <= 300 for reference in record.references)
        assert len(set(record.references)) == len(record.references)
        numbers = cited(record.answer)
        assert numbers == list(range(1, len(numbers) + 1))
        n_citing_two += len(numbers) == 2
        for passage, part in zip(record.references, re.split(r" \[\d+\]\. ?", record.answer)[:-1], strict=False):
            if STATED.fullmatch(part):
                n_stated += 1
                heading = heading_of(passage, headings)
                assert all(name.strip("`") in heading for name in re.findall(r"`.*?`", part))
            else:
                assert part in passage
                assert part in texts
    assert n_citing_two > 50
    assert 100 < n_stated < len(everything) / 2


def test_no_question_passage_or_sentence_is_on_two_sides(library, sides):
    sentences_of = {entry.heading: entry.sentences for entry in library}
    found = []
    for side in SIDES:
        passages = {text for record in sides[side] for text in record.references}
        headings = {heading_of(passage, sentences_of) for passage in passages}
        said = {sentence for heading in headings for sentence in sentences_of[heading]}
        assert len(said) > 50
        found.append({record.question for record in sides[side]} | passages | headings | said)
    train, val, test = found
    assert not train & val
    assert not train & test
    assert not val & test


def test_the_records_are_made_once_and_always_the_same(library, monkeypatch):
    readings = []
    monkeypatch.setattr(python_questions, "entries", lambda _: readings.append(1) or library[::20])

    def train(seed):
        return list(PythonQuestions(seed=seed).records("train"))

    first = train(seed=1)
    assert train(seed=1) == first
    assert len(readings) == 1
    (file,) = (cache_root() / "records").iterdir()
    assert {json.loads(line)["side"] for line in file.read_text().splitlines()} == set(SIDES)
    file.unlink()
    assert train(seed=1) == first
    assert len(readings) == 2
    other = train(seed=2)
    assert other != first
    assert [record.question for record in other] == [record.question for record in first]


def test_the_documentation_of_join(monkeypatch):
    files = [Path(sysconfig.get_path("stdlib"), f"{name}.py") for name in ("ntpath", "posixpath")]
    monkeypatch.setattr(python_questions, "_python_files", lambda root: iter(files))
    (join,) = [entry for entry in entries() if entry.name == "os.path.join"]
    assert (join.kind, join.group, join.parameters[0][0]) == ("function", "os.path", join.parameters[0][0])
    asked = dict(ask(join))
    ((_, number, answer),) = asked["What does `os.path.join` do?"]
    assert (number, answer[:4]) == (0, "Join")


FAKE = Entry(
    "m.f",
    "function",
    "m",
    "m.f(path, mode='r', *rest)",
    (
        "Open a file.",
        "Return the file object.",
        "If path is missing, raise FileNotFoundError.",
        "It does not raise OSError.",
        "Raise TypeError or ValueError.",
        "The mode is read first.",
        "A remark.",
    ),
    parameters=(("path", None), ("mode", "'r'"), ("*rest", None)),
)


def test_modules_are_read_in_alphabetical_order_and_every_file_is_public():
    root = Path(sysconfig.get_path("stdlib"))
    files = list(python_questions._python_files(root))
    assert len(files) > 300
    names = [file.relative_to(root).with_suffix("").parts for file in files]
    assert not any(part.startswith("_") and part != "__init__" for parts in names for part in parts)
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(parts) for parts in names)
    modules = {entry.group for entry in entries(3)} - {entry.group for entry in python_questions._built_in()}
    assert modules <= {file.stem for file in islice(files, 3)}
    assert modules


def test_files_that_cannot_be_parsed_are_skipped(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("print 1\n")
    (tmp_path / "good.py").write_text('"""Do good things today."""\n')
    (tmp_path / "latin.py").write_bytes(b'"""Caf\xe9."""\n')
    monkeypatch.setattr(python_questions.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [entry.name for entry in python_questions._library(None)] == ["good"]


def test_a_damaged_file_of_records_is_named():
    source = PythonQuestions()
    source._file.parent.mkdir(parents=True)
    source._file.write_text('{"side": "train"')
    with pytest.raises(MisconfigurationException, match=r"records/.*jsonl is damaged .*: delete it"):
        list(source.records("train"))


def test_what_is_asked_about_a_function():
    assert {question: [(number, answer) for _, number, answer in cited] for question, cited in ask(FAKE)} == {
        "What does `m.f` do?": [(0, "Open a file.")],
        "What does `m.f` return?": [(1, "Return the file object.")],
        "When does `m.f` raise `FileNotFoundError`?": [(2, "If path is missing, raise FileNotFoundError.")],
        "What does the documentation of `m.f` say about `mode`?": [(5, "The mode is read first.")],
        "Which arguments does `m.f` take?": [(None, "It takes `path`, `mode` and `*rest`")],
        "What is the default of `mode` in `m.f`?": [(None, "The default of `mode` is `'r'`")],
    }


def test_what_is_asked_about_a_class_a_module_and_two_functions():
    a_class = Entry("m.C", "class", "m", "class m.C(A, b.B)", ["A thing."], bases=("A", "b.B"))
    assert [question for question, _ in ask(a_class)] == [
        "What is the class `m.C`?",
        "What does the class `m.C` derive from?",
    ]
    assert list(ask(a_class))[1][1][0][2] == "It derives from `A` and `b.B`"
    assert [question for question, _ in ask(Entry("m", "module", "m", "m", ["Things."]))] == [
        "What is the module `m` for?"
    ]
    other = Entry("m.g", "function", "m", "m.g()", ["Close a file."])
    ((question, cited),) = ask_about_two([a_class, FAKE, other])
    assert question == "What do `m.f` and `m.g` do?"
    assert [answer for _, _, answer in cited] == ["Open a file.", "Close a file."]


def test_sentences_of_a_docstring():
    text = (
        "Join parts, e.g. Lists and sets.\nThe second line goes on. PEP 8 by G. Rossum says so.\n\n"
        "More: of this\n\n    indented code\n\nNot read any more."
    )
    assert sentences(text) == [
        "Join parts, e.g. Lists and sets.",
        "The second line goes on.",
        "PEP 8 by G. Rossum says so.",
        "More: of this",
    ]
    assert sentences("no capital letter here") == []
    assert sentences("See sys.argv[0] for more. This is not read.") == []
    assert sentences("Short.") == []


def test_a_sentence_far_into_a_docstring_begins_its_passage():
    source = PythonQuestions(passage_characters=60)
    assert source._passage(FAKE, 0) == "m.f(path, mode='r', *rest): Open a file."
    assert source._passage(FAKE, 5) == "m.f(path, mode='r', *rest): The mode is read first."
    assert source._passage(FAKE, 2) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passage_characters": 10}, "passage_characters is 10"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "leave something to train on"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        PythonQuestions(**options)


def test_a_python_without_documentation(monkeypatch):
    monkeypatch.setattr(python_questions, "entries", lambda _: [])
    with pytest.raises(MisconfigurationException, match="has no documentation to ask about"):
        PythonQuestions().prepare()
