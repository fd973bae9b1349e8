"""`llm-train list`: topics, experiments, studies and classes, one line each; it imports none of them."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import names
from experiments.errors import CommandParser
from experiments.help import index, options
from experiments.help.source_text import kept_in_cache

Rows = Iterator[tuple[str, str]]  # name or class path, and what it is


def topics() -> Rows:
    """Yield the topics of the working folder and of the project."""
    found: dict[str, str] = {}
    for root in names.ROOTS:
        for folder in sorted({file.parent for file in root.glob("*/offline.yaml")}):
            found.setdefault(folder.name, _heading(folder / "README.md"))
    yield from sorted(found.items())


class Kind(NamedTuple):
    """What is listed: a function that yields its rows, and how it is used."""

    rows: Callable[[], Rows]
    use: str = ""


KINDS = {
    "topics": Kind(topics),
    "experiments": Kind(
        lambda: (row for row in _files("*.yaml", "*/*.yaml") if not row[0].startswith("trainer/")),
        "llm-train fit -c NAME",
    ),
    "presets": Kind(lambda: _files("trainer/*.yaml"), "llm-train fit -c NAME -c PRESET"),
    "studies": Kind(lambda: _files("*/studies/*.yaml"), "llm-train study NAME"),
    "modules": Kind(lambda: _classes("model", "data"), "model: {class_path: ...} and data: {class_path: ...}"),
    "sources": Kind(lambda: _classes("data.source"), "--data.source CLASS"),
    "callbacks": Kind(lambda: _classes("trainer.callbacks"), "--trainer.callbacks+ CLASS"),
    "optimizers": Kind(lambda: _classes("optimizer"), "--optimizer CLASS"),
    "schedules": Kind(lambda: _classes("lr_scheduler"), "--lr_scheduler CLASS"),
}


def _classes(*flags: str) -> Rows:
    return ((kind.path, kind.summary) for flag in flags for kind in options.classes(flag))


def _files(*patterns: str) -> Rows:
    yield from ((name, comment(file)) for name, file in names.files(*patterns).items())


def comment(file: Path) -> str:
    """Return the first sentence of the comment that a YAML file begins with."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    marked = re.match(r"(?:#.*\n)*", "\n".join(lines) + "\n")
    text = [line.lstrip("#").strip() for line in (marked[0].splitlines() if marked else ())]
    stop = next((i for i, line in enumerate(text) if re.match(r"\w+: |llm-train ", line)), len(text))
    return index.first_sentence("\n".join(text[:stop]))


def _heading(readme: Path) -> str:
    if not readme.is_file():
        return ""
    first = readme.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").partition(":")[2].strip()


def main(args: Sequence[str]) -> None:
    """Print what there is, of one kind or of all."""
    parser = CommandParser(
        prog="llm-train list",
        description="List topics, experiments, studies and classes: by name or class path, with one line each. "
        "`llm-train fit --model.help CLASS` explains a class.",
    )
    parser.add_argument("kind", nargs="?", choices=KINDS, help="what to list (default: all)")
    asked = parser.parse_args(args[1:]).kind
    with kept_in_cache():
        _print(asked)


def _print(asked: str | None) -> None:
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for title in [asked] if asked else KINDS:
        kind = KINDS[title]
        if not asked:
            print(f"{title}:  {kind.use}" if kind.use else title)
        rows = [*kind.rows()]
        width = max((len(name) for name, _ in rows), default=0)
        for name, what in rows:
            print(f"{'' if asked else '  '}{name:<{width}}  {what}".rstrip()[:columns])
        if title == "schedules":
            print(options.STEPS_OF_SCHEDULES, file=sys.stderr)
        if not asked:
            print()
