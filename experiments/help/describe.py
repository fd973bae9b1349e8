"""The help of fit, validate, test and predict, and of a class; it imports neither PyTorch nor Lightning."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from experiments import names
from experiments.__main__ import COMMANDS
from experiments.help import index, options
from experiments.help.index import Parameter
from experiments.help.source_text import kept_in_cache

_ABOUT = """\
Settings come from `experiments/trainer/defaults.yaml`, from each -c and from each flag, in this order. Later ones go
over earlier ones: mappings are merged and a list is replaced; `--trainer.callbacks+ CLASS` adds to a list."""


@kept_in_cache()
def main(args: Sequence[str]) -> None:
    """Print the help of a command, or of the class that `--KEY.help CLASS` names.

    Args:
        args: Command line, the command first.
    """
    for flag, value in names.flags(args[1:]):
        if match := re.fullmatch(r"--([\w.]+)\.help", flag):
            if not _print_class(match[1], value):
                _ask_the_parser(args)
            return
    _print_command(args[0], options.chosen(args[1:]))


def _print_class(key: str, path: str) -> bool:
    """Print the help of a class, or the classes that a flag takes; return whether they are known."""
    kinds = [] if (kind := index.find(path)) else options.classes(key)
    kind = kind or next((kind for kind in kinds if kind.name == path), None)
    if kind is not None:
        print(f"{kind.path}: {kind.summary}\n")
        _print_note(key)
        _print_options(f"--{key}.", options.arguments(kind.path).values())
        return True
    if not kinds or (path and not path.startswith("-")):
        return False
    print(f"--{key} CLASS")
    _print_note(key)
    _print_classes(kinds)
    return True


def _ask_the_parser(args: Sequence[str]) -> None:
    from experiments.cli import main as parse  # here, because the import takes seconds

    parse(args)


def _print_command(command: str, chosen: dict[str, options.Chosen]) -> None:
    print(f"usage: llm-train {command} -c NAME [-c FILE ...] [--KEY VALUE ...]\n")
    _wrap(f"{COMMANDS[command][1].capitalize()}. {_ABOUT}")
    print("\noptions:")
    own = options.own(command)
    _print_options("--", own.values())
    print("\nrun:")
    _print_options("--run.", options.section("run").values())
    for name in options.SECTIONS:
        section = chosen[name]
        print(f"\n{name}: --{name} CLASS, and its arguments: --{name}.ARGUMENT VALUE")
        _print_note(name)
        if section.path:
            print(f"  {section.path}")
            _print_options(f"--{name}.", options.arguments(section.path).values(), section.arguments)
        else:
            _print_classes(options.classes(name))
    print("\ntrainer:")
    _print_options("--trainer.", options.section("trainer").values())
    print("\ncallbacks: --trainer.callbacks+ CLASS, and its arguments: --trainer.callbacks.ARGUMENT VALUE")
    _print_classes(options.classes("trainer.callbacks"))
    print()
    _wrap(
        f"With -c, this help has the arguments of the classes that the files name. `llm-train {command} --model.help "
        "CLASS` explains any class, `llm-train list` lists the experiments and classes."
    )


def _print_note(key: str) -> None:
    if key == "lr_scheduler":
        _wrap(options.STEPS_OF_SCHEDULES)


def _print_classes(kinds: Iterable[index.Class]) -> None:
    for kind in kinds:
        print(f"  {kind.path}")
        if kind.summary:
            _wrap(kind.summary, " " * 6)


def _print_options(start: str, parameters: Iterable[Parameter], given: dict[str, object] | None = None) -> None:
    for parameter in parameters:
        short = "-c, " if start == "--" and parameter.name == "config" else ""
        notes = [parameter.type] if parameter.type else []
        if given and parameter.name in given:
            notes.append(f"here {given[parameter.name]}")
        elif (default := options.written(parameter.default)) is not None:
            notes.append(f"default: {default}")
        elif parameter.name not in ("config", "print_config"):
            notes.append("required")
        print(f"  {short}{start}{parameter.name}")
        _wrap(" ".join(filter(None, [parameter.help, f"({', '.join(notes)})" if notes else ""])), " " * 6)


def _wrap(text: str, indent: str = "") -> None:
    columns = min(100, shutil.get_terminal_size().columns)
    words = " ".join(text.split())
    print(textwrap.fill(words, columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False))
