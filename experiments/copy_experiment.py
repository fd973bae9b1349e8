"""`llm-train copy NAME [TO]`: a YAML of one's own, which begins as a copy of an experiment, a study or a preset."""

import re
from collections.abc import Sequence
from pathlib import Path

from experiments import names
from experiments.errors import CommandParser, UserError
from lightning_modules.common.files import write_text


def main(args: Sequence[str]) -> None:
    """Copy a YAML into the working folder, with its comments, and print the command that runs it.

    Args:
        args: Command line, `copy` first.
    """
    parser = CommandParser(
        prog="llm-train copy",
        description="Copy an experiment, a study or a preset into the working folder, with its comments, to be edited.",
    )
    parser.add_argument("name", metavar="NAME", help="such as TOPIC/offline; `llm-train list experiments` has all")
    parser.add_argument("to", metavar="TO", nargs="?", help="file to write (default: my_offline.yaml)")
    options = parser.parse_args(args[1:])
    source = names.find_or_explain(options.name, "copy")
    target = copy(source, Path(options.to or f"my_{source.name}"))
    text = target.read_text(encoding="utf-8")
    print(f"wrote   {target}")
    for command in re.findall(r"^# Needs: (llm-train .*)$", text, re.MULTILINE):
        print(f"needs   {command}")
    print(f"next    {_command(text).format(target)}")


def copy(source: Path, target: Path) -> Path:
    """Copy a YAML file, and return the copy; its comments and the name of a study become those of the copy.

    Args:
        source: The file.
        target: The copy; without an ending it gets `.yaml`, and in a folder the name of the source.

    Raises:
        UserError: If there is such a file.
    """
    if target.is_dir():
        target = target / source.name
    if target.suffix not in (".yaml", ".yml"):
        target = target.with_name(f"{target.name}.yaml")
    if target.exists():
        raise UserError(f"copy: {target} exists; give another file: llm-train copy NAME TO")
    text = source.read_text(encoding="utf-8")
    comment = re.compile(r"^#.*$", re.MULTILINE)
    text = comment.sub(lambda line: _of_the_copy(line[0], source, target), text)
    text = re.sub(rf"^name: {re.escape(source.stem)}$", f"name: {target.stem}", text, flags=re.MULTILINE)
    write_text(target, text)
    return target


def _of_the_copy(line: str, source: Path, target: Path) -> str:
    """Return a line of the comment of a file for its copy, which has another path and other runs."""
    root, path = names.SHIPPED.parent.resolve(), source.resolve()
    named = path.relative_to(root) if path.is_relative_to(root) else source  # as comments name it
    line = re.sub(rf"(?<![\w./-]){re.escape(named.as_posix())}\b", lambda _: target.as_posix(), line)
    line = line.replace("README.md of this folder", (named.parent / "README.md").as_posix())
    return re.sub(rf"\bruns/(\w+)/{re.escape(source.stem)}\b", rf"runs/\1/{target.stem}", line)


def _command(text: str) -> str:
    """Return the command for a file of settings; `{}` is its name."""
    if re.search(r"^parameters:", text, re.MULTILINE):
        return "llm-train study {}"
    return "llm-train fit -c {}" if re.search(r"^model:", text, re.MULTILINE) else "llm-train fit -c FILE -c {}"
