"""`llm-train list`: topics, experiments, studies and classes, one line each; it imports none of them."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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


def experiments() -> Rows:
    """Yield the experiments by name."""
    yield from ((name, what) for name, what in _files("*.yaml", "*/*.yaml") if not name.startswith("trainer/"))


def presets() -> Rows:
    """Yield the presets for hardware by name."""
    yield from _files("trainer/*.yaml")


def studies() -> Rows:
    """Yield the studies by name."""
    yield from _files("*/studies/*.yaml")


def modules() -> Rows:
    """Yield the modules and the datamodules."""
    yield from _classes("model")
    yield from _classes("data")


def sources() -> Rows:
    """Yield the sources of text or of rows."""
    yield from _classes("data.source")


def callbacks() -> Rows:
    """Yield the callbacks of the project and of Lightning."""
    yield from _classes("trainer.callbacks")


def optimizers() -> Rows:
    """Yield the optimisers of the project and of PyTorch."""
    yield from _classes("optimizer")


def schedules() -> Rows:
    """Yield the learning-rate schedules of the project and of PyTorch."""
    yield from _classes("lr_scheduler")


KINDS: dict[str, Callable[[], Rows]] = {
    kind.__name__: kind
    for kind in (topics, experiments, presets, studies, modules, sources, callbacks, optimizers, schedules)
}
_USES = {
    "experiments": "llm-train fit -c NAME",
    "presets": "llm-train fit -c NAME -c PRESET",
    "studies": "llm-train study NAME",
    "modules": "model: {class_path: ...} and data: {class_path: ...}",
    "sources": "--data.source CLASS",
    "callbacks": "--trainer.callbacks+ CLASS",
    "optimizers": "--optimizer CLASS",
    "schedules": "--lr_scheduler CLASS",
}


def _classes(flag: str) -> Rows:
    for kind in options.classes(flag):
        yield kind.path, kind.summary


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
    for kind in [asked] if asked else KINDS:
        if not asked:
            print(f"{kind}{f':  {_USES[kind]}' if kind in _USES else ''}")
        rows = [*KINDS[kind]()]
        width = max((len(name) for name, _ in rows), default=0)
        for name, what in rows:
            print(f"{'' if asked else '  '}{name:<{width}}  {what}".rstrip()[:columns])
        if kind == "schedules":
            print(options.STEPS_OF_SCHEDULES, file=sys.stderr)
        if not asked:
            print()
