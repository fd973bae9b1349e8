"""`llm-train new NAME`: write a topic, small and working."""

import importlib.util
import keyword
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import CommandParser, UserError
from experiments.names import SHIPPED
from lightning_modules.common.files import write_text

FOLDERS = ("experiments", "lightning_modules", "datamodules", "tests")
TEMPLATE = Path(__file__).parent / "template"
_TOPIC = "majority"  # the name of the topic in the template
_GUIDE = SHIPPED / "guides" / "your_topic.md"


def main(args: Sequence[str]) -> None:
    """Write a topic: into the checkout in the working folder, or as a package of the user.

    Args:
        args: Command line, `new` first.
    """
    parser = CommandParser(
        prog="llm-train new",
        description="Write a small working topic: module, datamodule, YAML, study, README and tests. In the root of a "
        "checkout of the project it gets a package in each of its folders; elsewhere it is one package in the working "
        "folder.",
    )
    parser.add_argument("name", metavar="NAME", help="name of the topic, such as letter_counts")
    name = parser.parse_args(args[1:]).name
    in_checkout = all((Path() / top).exists() for top in (*FOLDERS, "README.md"))
    folders = (write_topic if in_checkout else write_package)(name, Path())
    print("\n".join(f"wrote   {folder}/" for folder in folders))
    if in_checkout:
        print("wrote   a row of the table in README.md")
    print(f"next    llm-train fit -c {name}/offline")
    if importlib.util.find_spec("pytest") is None:
        print("        pip install pytest")
    print(f"        python -m pytest {folders[-1]}")
    guide = _GUIDE.relative_to(Path.cwd()) if _GUIDE.is_relative_to(Path.cwd()) else _GUIDE
    print(f"read    {guide}, and replace what the template does")


def write_topic(name: str, root: Path) -> list[Path]:
    """Write the packages of a topic and its row in the README, and return its folders.

    Args:
        name: Name of the topic: a Python name in lower case.
        root: Root of a checkout of the project.

    Raises:
        UserError: If there can be no topic of this name.
    """
    folders = [root / top / name for top in FOLDERS]
    _check(name, folders)
    for source in _template(*FOLDERS):
        top, *parts = source.relative_to(TEMPLATE).parts
        _write(root.joinpath(top, name, *parts), source.read_text(encoding="utf-8"), name)
    readme = root / "README.md"
    readme.write_text(with_row(readme.read_text(encoding="utf-8"), name), encoding="utf-8")
    return folders


def write_package(name: str, root: Path) -> list[Path]:
    """Write a topic as one package, and return its folder.

    Args:
        name: Name of the topic: a Python name in lower case.
        root: Folder to write it into.

    Raises:
        UserError: If there can be no topic of this name.
    """
    folder = root / name
    _check(name, [folder])
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"new: Python has a package {name}, which the topic would hide; choose another name")
    exports = ""
    for source in _template(*FOLDERS, "package"):
        _, *parts = source.relative_to(TEMPLATE).parts
        text = source.read_text(encoding="utf-8")
        text = re.sub(rf"\b(lightning_modules|datamodules)\.{_TOPIC}\b", _TOPIC, text)
        text = re.sub(rf"\b(experiments|tests)/{_TOPIC}\b", _TOPIC, text)
        text = text.replace(f'parents[2] / "{_TOPIC}/', 'parent / "')
        if source.name == "__init__.py":
            exports += text.partition("\n\n")[2].partition("\n\n")[0] + "\n"
        elif source.name != "conf.yaml":  # is for the tests of the project
            _write(folder.joinpath(*parts), text, name)
    classes = sorted(re.findall(r"import (\w+)", exports))
    listed = ", ".join(f'"{kind}"' for kind in classes)
    imports = "".join(sorted(exports.splitlines(keepends=True)))
    _write(folder / "__init__.py", f'"""The topic `{_TOPIC}`."""\n\n{imports}\n__all__ = [{listed}]\n', name)
    return [folder]


def _check(name: str, folders: Sequence[Path]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"new: {name!r} is not a Python name in lower case; choose one such as letter_counts")
    taken = [folder for folder in folders for path in (folder, folder.with_suffix(".py")) if path.exists()]
    if taken:
        raise UserError(f"new: {taken[0]} exists; choose another name")


def _template(*tops: str) -> list[Path]:
    files = [path for top in tops for path in (TEMPLATE / top).rglob("*")]
    return sorted(path for path in files if path.suffix in (".py", ".yaml", ".md"))


def _write(target: Path, text: str, name: str) -> None:
    target = target.with_name(target.name.replace(_TOPIC, name))
    write_text(target, _renamed(text, name))


def _renamed(text: str, name: str) -> str:
    camel = "".join(part.capitalize() for part in name.split("_"))
    return text.replace(_TOPIC, name).replace(_TOPIC.capitalize(), camel)


def with_row(readme: str, name: str) -> str:
    """Return the README with a row for a topic at the end of its table of topics.

    Args:
        readme: Text of the README.
        name: Name of the topic.
    """
    lines = readme.splitlines(keepends=True)
    topics = [number for number, line in enumerate(lines) if line.startswith("| [`")]
    end = topics[-1] if topics else len(lines)
    while end < len(lines) and lines[end].startswith("|"):  # a topic may have several rows
        end += 1
    lines.insert(end, f"| [`{name}`](experiments/{name}/README.md) | TODO | not measured | |\n")
    return "".join(lines)
