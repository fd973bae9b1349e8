"""`llm-train completion SHELL`: a script for the shell, which asks this module for the words that can follow a line."""

import glob
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import names
from experiments.__main__ import COMMANDS
from experiments.errors import CommandParser
from experiments.help import index, listing, options
from experiments.help.source_text import kept_in_cache

_SCRIPTS = {
    "bash": """\
_llm_train() {
    local IFS=$'\\n'
    COMPREPLY=($(llm-train completion --line "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ ${COMPREPLY-} == */ || ${COMPREPLY-} == *= ]] && compopt -o nospace
}
complete -o default -F _llm_train llm-train
""",
    "zsh": """\
_llm_train() {
    local -a found
    found=("${(@f)$(llm-train completion --shell zsh --line "${LBUFFER}" 2>/dev/null)}")
    [[ -n "$found[1]" ]] && compadd -Q -- $found || _files
}
compdef _llm_train llm-train
""",
    "tcsh": """\
complete llm-train 'p@*@`llm-train completion --shell tcsh --line "$COMMAND_LINE"`@'
""",
}
_AS_FIT = ("prepare", "estimate")  # take the files and flags of `fit` too
_BREAKS = "=:"  # characters after which bash begins a new word


def main(args: Sequence[str]) -> None:
    """Print the script, or the words that complete a line."""
    parser = CommandParser(
        prog="llm-train completion",
        description='Print a completion script; `eval "$(llm-train completion bash)"` enables it.',
    )
    parser.add_argument("shell", nargs="?", choices=_SCRIPTS)
    parser.add_argument("--line", help="line to complete, which the script gives")
    parser.add_argument("--shell", dest="of", choices=_SCRIPTS, default="bash", help="shell of the line")
    options_given = parser.parse_args(args[1:])
    if options_given.line is None:
        if options_given.shell is None:
            parser.error(f"give a shell: {', '.join(_SCRIPTS)}")
        print(_SCRIPTS[options_given.shell], end="")
        return
    with kept_in_cache():
        for word in complete(options_given.line, breaks=_BREAKS if options_given.of == "bash" else ""):
            print(word)


def complete(line: str, breaks: str = "") -> list[str]:
    """Return the words that the last word of a line can become.

    Args:
        line: The line up to the cursor, from the name of the command.
        breaks: Characters after which the shell begins a new word: what is before the last of them is left out.
    """
    words = _split(line)
    before, current = words[1:-1], words[-1] if len(words) > 1 else ""
    flag, equals, _ = current.partition("=")
    start = f"{flag}=" if equals and flag.startswith("-") else ""
    found = sorted({f"{start}{word}" for word in _candidates(before, current) if f"{start}{word}".startswith(current)})
    cut = max((current.rfind(character) for character in breaks), default=-1) + 1
    return [word[cut:] for word in found]


def _split(line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that is still open
        words = line.split()
    return [*words, ""] if not words or line[-1:].isspace() else words


def _candidates(before: Sequence[str], current: str) -> Iterator[str]:
    if not before:
        yield from COMMANDS
        return
    command, previous = before[0], before[-1]
    flag, equals, value = current.partition("=")
    if equals and current.startswith("-"):
        yield from _values(command, flag, before, value)
    elif current.startswith("-"):
        yield from _flags(command, before, current)
    elif previous.startswith("-") and "=" not in previous:
        yield from _values(command, previous, before, current)
    else:
        yield from _words(command, current)


def _words(command: str, current: str) -> Iterator[str]:
    """Yield the words that follow a command without a flag."""
    match command:
        case "study":
            yield from names.files("*/studies/*.yaml")
            yield from _files(current, ".yaml")
        case "copy":
            yield from names.names()
            yield from _files(current, ".yaml")
        case "list":
            yield from listing.KINDS
        case "completion":
            yield from _SCRIPTS
        case "compare" | "convert":
            yield from _files(current)
        case "claims":  # of topics of the user, of a checkout and of the project
            yield from (file.parent.name for root in names.ROOTS for file in root.glob("*/claims.yaml"))
        case "fit" | "validate" | "test" | "predict" | "prepare" | "estimate":
            yield "-c"


def _flags(command: str, before: Sequence[str], current: str) -> Iterator[str]:
    if command not in options.COMMANDS:
        module = COMMANDS[command][0] if command in COMMANDS else ""
        yield from re.findall(r'\(\s*"(--\w+)",', index.source(module))  # of calls, and of a table
        yield "--help"
        if command not in _AS_FIT:
            return
        command = "fit"
    yield from ("-c", "--help")
    key = current.lstrip("-")
    yield from (f"--{name}" for name in options.own(command))
    yield from (f"--{name}" for name in options.SECTIONS)
    for name in ("run", "trainer"):
        if f"{name}.".startswith(key[: len(name) + 1]):
            yield from (f"--{name}.{option}" for option in options.section(name))
    if "trainer.callbacks".startswith(key[:17]):
        yield from ("--trainer.callbacks+", "--trainer.logger+")
    for name, section in options.chosen(before[1:]).items():
        if section.path and f"{name}.".startswith(key[: len(name) + 1]):
            yield from (f"--{name}.{option}" for option in options.arguments(section.path))


def _values(command: str, flag: str, before: Sequence[str], current: str) -> Iterator[str]:
    command = "fit" if command in _AS_FIT else command
    key = flag.lstrip("-").rstrip("+")
    if flag in names.FILE_FLAGS:
        yield from names.files("*.yaml", "*/*.yaml")
        yield from _files(current, ".yaml")
    elif key in ("run", "ckpt_path", "allow"):
        yield from ("last", "best") if key == "ckpt_path" else ()
        yield from _files(current)
    elif command in options.COMMANDS:
        if kinds := options.classes(key, current):
            yield from (kind.path for kind in kinds)
        name, dot, option = key.partition(".")
        known = {} if dot else options.own(command)
        if dot and name in ("run", "trainer"):
            known = options.section(name)
        elif dot and name in options.SECTIONS:
            known = options.arguments(options.chosen(before[1:])[name].path)
        if (parameter := known.get(option if dot else name)) is not None:
            yield from options.values(parameter)


def _files(current: str, ending: str = "") -> Iterator[str]:
    """Yield the folders, and the files of an ending, whose path begins with what is typed."""
    for path in glob.iglob(f"{glob.escape(current)}*"):
        if Path(path).is_dir():
            yield f"{path}/"
        elif path.endswith(ending):
            yield path
