"""Questions about Python's standard library, made from its documentation, which every machine has.

An object of the library (a module, a class, a function) has a signature and a docstring. A passage is the signature and
some consecutive sentences of the docstring. A question asks for one of the sentences, or for a part of the signature.
The answer is that sentence, word for word, with the number of the passage that contains it:

    What does `os.path.isabs` return?
    [1] os.path.isabs(s): Test whether a path is absolute
    [2] ...

A question is made only if the documentation answers it: "when does it raise" needs a sentence with the exception.
"""

import ast
import builtins
import json
import os.path
import random
import re
import sys
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import cast

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules.cache import digest
from datamodules.gpt2_webglm_qa.cited_answers import Record, RecordSource, parse_record
from datamodules.splits import SIDES, Side, require_fractions, side_of
from lightning_modules.common.cache import cache_root
from lightning_modules.common.files import atomic_file
from lightning_modules.common.messages import say
from lightning_modules.common.ranges import PositiveInt, Probability

_FORMAT = 1  # increase it when the records change, so that older files are not read
# Installed packages, and parts of the library that are not meant for import.
_SKIPPED = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test", "idlelib", "lib2to3"}
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<![ .][A-Z]\.)\s+(?=[\"'`*(]?[A-Z])")
_SENTENCE = re.compile(r"[\"'`*(]?[A-Z](?!.*(?:\[\d+\]|->|>>>|::)).*\s\S+\s.*[^:,;\s]")
_EXCEPTION = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Iteration)\b")
_RAISES = re.compile(r"\b[Rr]aise[sd]?\b")
_DENIED = re.compile(r"\b(?:not|never|without|rather)\b|n't\b")


@dataclass(frozen=True)
class Entry:
    """The documentation of one object."""

    name: str  # full name, such as `os.path.join`
    kind: str  # `module`, `class` or `function`
    group: str  # module, or built-in type; the objects of a group share a split
    heading: str  # name and signature
    sentences: Sequence[str]  # of the docstring
    parameters: tuple[tuple[str, str | None], ...] = ()  # names with their stars, source of the defaults or None
    bases: tuple[str, ...] = ()


Cited = tuple[Entry, int | None, str]  # an object, the number of the cited sentence (None: the heading), the answer


@dataclass
class PythonQuestions(RecordSource):
    """Questions about the standard library of the running Python, with passages of its documentation.

    A record has the passages that its answer cites, in the order of the citations, and then other passages, of the same
    module if it has enough. All records about a module are in one split, and no sentence is in two. The records depend
    only on the Python version and the arguments; they are made once and kept in the cache.

    Args:
        n_references: Passages in a record, at least 1; a record whose answer cites two has at least two.
        passage_characters: Largest number of characters in a passage, with its signature, at least 60.
        val_fraction: Part of the modules that is held out for validation, 0 to less than 1.
        test_fraction: Part of the modules that is held out for the test, 0 to less than 1.
        seed: Seed of the choice of passages that are not cited.
        max_modules: Number of modules to read, in alphabetical order, in addition to the built-in functions and types;
            `null` for all. A small number gives a small data set quickly.

    Raises:
        MisconfigurationException: If `passage_characters` is too small, or nothing is left to train on.
    """

    n_references: PositiveInt = 3
    passage_characters: int = 300
    val_fraction: Probability = 0.05
    test_fraction: Probability = 0.05
    seed: int = 0
    max_modules: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.passage_characters < 60:
            raise MisconfigurationException(
                f"data.records.passage_characters is {self.passage_characters}: give at least 60"
            )
        self.fractions = require_fractions(self.val_fraction, self.test_fraction, "data.records")

    def records(self, side: Side) -> Iterator[Record]:
        """Yield the records about the modules of a split."""
        self.prepare()
        try:
            rows = [json.loads(line) for line in self._file.read_bytes().splitlines()]
        except ValueError as error:
            raise MisconfigurationException(f"{self._file} is damaged ({error}): delete it") from error
        for number, row in enumerate(rows, start=1):
            if row["side"] == side:
                yield parse_record(row, f"{self._file}, line {number}")

    @property
    def _file(self) -> Path:
        python = [sys.version, sysconfig.get_path("stdlib")]
        arguments = [self.n_references, self.passage_characters, self.fractions, self.seed, self.max_modules]
        return cache_root() / "records" / f"{digest([_FORMAT, python, *arguments])}.jsonl"

    def prepare(self) -> None:
        """Make the records, unless the cache has them."""
        if self._file.exists():
            return
        rows = [vars(record) | {"side": side} for side, record in self._make(list(entries(self.max_modules)))]
        if not rows:
            raise MisconfigurationException(
                f"{sys.executable} has no documentation to ask about: use a complete Python, or JSON lines with "
                "datamodules.gpt2_webglm_qa.JSONLines"
            )
        try:
            with atomic_file(self._file) as file:
                file.writelines((json.dumps(row) + "\n").encode() for row in rows)
        except OSError as error:
            raise MisconfigurationException(
                f"the records cannot be written to {self._file.parent} ({error}): make room there, or choose another "
                "folder with $LLM_TRAIN_CACHE"
            ) from error
        say(f"{len(rows):,} records made from the documentation of {sys.executable}, in {self._file}")

    def _make(self, documented: list[Entry]) -> Iterator[tuple[Side, Record]]:
        for side in SIDES:
            here = [entry for entry in documented if side_of(entry.group, *self.fractions) == side]
            groups: defaultdict[str, list[Entry]] = defaultdict(list)
            for entry in here:
                groups[entry.group].append(entry)
            asked: set[str] = set()
            for group in groups.values():
                for question, cited in (*(item for entry in group for item in ask(entry)), *ask_about_two(group)):
                    if question not in asked and (record := self._record(question, cited, group, here)):
                        asked.add(question)
                        yield side, record

    def _record(self, question: str, cited: list[Cited], group: list[Entry], here: list[Entry]) -> Record | None:
        found = [self._passage(entry, sentence) for entry, sentence, _ in cited]
        passages = [passage for passage in found if passage is not None]
        if len(passages) < len(cited):
            return None
        answers = [f"{answer.rstrip('.')} [{number}]." for number, (_, _, answer) in enumerate(cited, start=1)]
        draw = random.Random(f"{self.seed} {question}")
        spoken_of = {entry.name for entry, _, _ in cited}
        for pool in (group, here):
            for other in draw.sample(pool, min(len(pool), self.n_references + 2)):
                passage = self._passage(other, 0) if other.sentences and other.name not in spoken_of else None
                if passage is not None and len(passages) < self.n_references:
                    spoken_of.add(other.name)
                    passages.append(passage)
        return Record(question, " ".join(answers), tuple(passages))

    def _passage(self, entry: Entry, sentence: int | None) -> str | None:
        """Return the heading and the sentences that fit, from the first on, or `None` if the given one does not fit.

        If the given sentence is too far from the first, the passage starts with it.
        """
        for start in (0, sentence or 0):
            passage, last = f"{entry.heading}:", start - 1
            for number, text in enumerate(entry.sentences[start:], start=start):
                if len(passage) + 1 + len(text) > self.passage_characters:
                    break
                passage, last = f"{passage} {text}", number
            if last >= (sentence or 0):
                return passage
        return None


def ask(entry: Entry) -> Iterator[tuple[str, list[Cited]]]:
    """Yield the questions about an object that its documentation answers, each with the source of its answer."""
    name, parameters = f"`{entry.name}`", entry.parameters
    for number, sentence in enumerate(entry.sentences):
        question = None
        exceptions = set(_EXCEPTION.findall(sentence))
        named = [bare for p, _ in parameters if len(bare := p.strip("*")) > 2 and _speaks_of(sentence, bare)]
        if entry.kind == "function" and re.match(r"Returns?\b", sentence):
            question = f"What does {name} return?"
        elif number == 0:
            asked_of = {"function": f"What does {name} do?", "class": f"What is the class {name}?"}
            question = asked_of.get(entry.kind, f"What is the module {name} for?")
        elif _RAISES.search(sentence) and len(exceptions) == 1 and not _DENIED.search(sentence):
            question = f"When does {name} raise `{exceptions.pop()}`?"
        elif named:
            question = f"What does the documentation of {name} say about `{named[0]}`?"
        if question:
            yield question, [(entry, number, sentence)]
    if entry.kind == "function" and 1 <= len(parameters) <= 4:
        yield f"Which arguments does {name} take?", [(entry, None, f"It takes {_listed(p for p, _ in parameters)}")]
    for parameter, default in parameters:
        if entry.kind == "function" and default is not None and len(default) <= 20:
            question = f"What is the default of `{parameter}` in {name}?"
            yield question, [(entry, None, f"The default of `{parameter}` is `{default}`")]
            break  # one question of this kind for a function is enough
    if entry.bases:
        yield f"What does the class {name} derive from?", [(entry, None, f"It derives from {_listed(entry.bases)}")]


def ask_about_two(group: list[Entry]) -> Iterator[tuple[str, list[Cited]]]:
    """Yield questions about two neighbouring functions; their answers cite two passages."""
    functions = [entry for entry in group if entry.kind == "function" and entry.sentences]
    for one, other in zip(functions[::4], functions[1::4], strict=False):
        question = f"What do `{one.name}` and `{other.name}` do?"
        yield question, [(one, 0, one.sentences[0]), (other, 0, other.sentences[0])]


def _speaks_of(sentence: str, parameter: str) -> bool:
    if parameter not in sentence:  # most sentences need no pattern
        return False
    before = "If |When |The (?:optional )?(?:argument |parameter )?|Optional "
    return bool(re.match(rf"(?:{before})?[`'*\"]*{re.escape(parameter)}[`'*\"]*(?=[\s,])", sentence))


def _listed(names: Iterable[str]) -> str:
    *most, last = [f"`{name}`" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def entries(max_modules: int | None = None) -> Iterator[Entry]:
    """Yield the documented objects of the built-ins and of the first `max_modules` modules, no sentence twice."""
    seen: set[str] = set()
    for entry in chain(_built_in(), _library(max_modules)):
        # The text after a known sentence is dropped too, because it may refer to that sentence.
        fresh = tuple(takewhile(lambda sentence: sentence not in seen, entry.sentences))
        seen.update(fresh)
        if fresh:
            yield replace(entry, sentences=fresh)


def sentences(docstring: str) -> list[str]:
    """Return the sentences of a docstring up to its first list, example or table."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        lines = paragraph.split("\n")
        if any(line.startswith((" ", "\t", ">>>", "-", "*", "=", "@", ":", "+", "|")) for line in lines):
            break
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if not _SENTENCE.fullmatch(sentence):
                break  # the following sentences may refer to this one
            found.append(sentence)
    return found


def _built_in() -> Iterator[Entry]:
    """Yield the built-in functions and types, and the methods of the types."""
    for name, thing in sorted(vars(builtins).items()):
        if name.startswith("_") or not callable(thing) or not isinstance(thing.__doc__, str):
            continue
        if not isinstance(thing, type):
            yield _described(name, "function", "builtins", thing)
            continue
        yield _described(name, "class", name, thing)
        for method, function in sorted(vars(thing).items()):
            if not method.startswith("_") and isinstance(getattr(function, "__doc__", None), str):
                yield _described(f"{name}.{method}", "function", name, function)


def _described(name: str, kind: str, group: str, thing: object) -> Entry:
    signature = re.sub(r"\$\w+(, /)?(, )?", "", getattr(thing, "__text_signature__", None) or "()")  # $ marks `self`
    try:
        definition = cast(ast.FunctionDef, ast.parse(f"def f{signature}: pass").body[0])
        parameters = _parameters(definition.args) if kind == "function" else ()
    except SyntaxError:  # some defaults are not valid source code
        parameters = ()
    heading = f"{name}({_signature(parameters)})" if parameters else name
    return Entry(name, kind, group, heading, sentences(thing.__doc__ or ""), parameters)


def _library(max_modules: int | None) -> Iterator[Entry]:
    """Yield the public objects of the standard library, in the order of the names of its modules."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in islice(_python_files(root), max_modules):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name in ("ntpath", "posixpath"):  # os.path is one of them
            if name != os.path.__name__:
                continue
            name = "os.path"
        try:
            with tokenize.open(path) as file:  # reads with the encoding that the file declares
                tree = ast.parse(file.read())
        except (SyntaxError, UnicodeDecodeError):  # some files are templates
            continue
        if docstring := ast.get_docstring(tree):
            yield Entry(name, "module", name, name, sentences(docstring))
        yield from _members(tree, name, name)


def _python_files(folder: Path) -> Iterator[Path]:
    """Yield the files of the public modules."""
    for path in sorted(folder.iterdir()):
        name = path.stem
        if name in _SKIPPED or not name.isidentifier() or (name.startswith("_") and name != "__init__"):
            continue
        if path.is_dir():
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _members(node: ast.Module | ast.ClassDef, name: str, group: str) -> Iterator[Entry]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        full_name, text = f"{name}.{child.name}", sentences(ast.get_docstring(child) or "")
        if isinstance(child, ast.ClassDef):
            bases = tuple(ast.unparse(base) for base in child.bases)
            heading = f"class {full_name}({', '.join(bases)})" if bases else f"class {full_name}"
            yield Entry(full_name, "class", group, heading, text, bases=bases)
            yield from _members(child, full_name, group)
        else:
            parameters = _parameters(child.args)
            yield Entry(full_name, "function", group, f"{full_name}({_signature(parameters)})", text, parameters)


def _parameters(arguments: ast.arguments) -> tuple[tuple[str, str | None], ...]:
    """Return the names with their stars and the source of their defaults, without `self` and `cls`."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    found = [
        *((a.arg, default) for a, default in zip(positional, defaults, strict=True)),
        *((f"*{a.arg}", None) for a in [arguments.vararg] if a),
        *((a.arg, default) for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)),
        *((f"**{a.arg}", None) for a in [arguments.kwarg] if a),
    ]
    named = ((name, default) for name, default in found if name not in ("self", "cls"))
    return tuple((name, ast.unparse(default) if default else None) for name, default in named)


def _signature(parameters: Iterable[tuple[str, str | None]]) -> str:
    return ", ".join(name if default is None else f"{name}={default}" for name, default in parameters)
