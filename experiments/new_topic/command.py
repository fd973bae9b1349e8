"""`llm-train new-topic NAME`: write the four packages of a topic, small and working."""

import keyword
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import CommandParser, UserError

FOLDERS = ("experiments", "lightning_modules", "datamodules", "tests")
TEMPLATE = Path(__file__).parent / "template"
_TOPIC = "majority"  # the name of the topic in the template


def main(args: Sequence[str]) -> None:
    """Write a topic into the checkout in the working folder.

    Args:
        args: Command line, `new-topic` first.
    """
    parser = CommandParser(
        prog="llm-train new-topic",
        description="Write a small working topic: module, datamodule, YAML, study, README and tests.",
    )
    parser.add_argument("name", metavar="NAME", help="name of the topic, such as letter_counts")
    name = parser.parse_args(args[1:]).name
    written = write_topic(name, Path())
    print("\n".join(f"wrote   {folder}/" for folder in written))
    print("wrote   a row of the table in README.md")
    print(f"next    llm-train fit -c experiments/{name}/offline.yaml")
    print(f"        python -m pytest tests/{name}")
    print("read    experiments/new_topic/README.md, and replace what the template does")


def write_topic(name: str, root: Path) -> list[Path]:
    """Write the packages of a topic and its row in the README, and return its folders.

    Args:
        name: Name of the topic: a Python name in lower case.
        root: Root of a checkout of the project.

    Raises:
        UserError: If there can be no topic of this name, or the folder is no checkout.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"new-topic: {name!r} is not a Python name in lower case; choose one such as letter_counts")
    if missing := [top for top in (*FOLDERS, "README.md") if not (root / top).exists()]:
        raise UserError(f"new-topic: there is no {missing[0]} here; run it in the root of a checkout of the project")
    folders = [root / top / name for top in FOLDERS]
    taken = [folder for folder in folders for path in (folder, folder.with_suffix(".py")) if path.exists()]
    if taken:
        raise UserError(f"new-topic: {taken[0]} exists; choose another name")
    for source in sorted(path for path in TEMPLATE.rglob("*") if path.suffix in (".py", ".yaml", ".md")):
        top, *parts = source.relative_to(TEMPLATE).parts
        target = root.joinpath(top, name, *parts[:-1], parts[-1].replace(_TOPIC, name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_renamed(source.read_text(encoding="utf-8"), name), encoding="utf-8")
    readme = root / "README.md"
    readme.write_text(with_row(readme.read_text(encoding="utf-8"), name), encoding="utf-8")
    return folders


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
    last = max((number for number, line in enumerate(lines) if line.startswith("| [`")), default=len(lines) - 1)
    lines.insert(last + 1, f"| [`{name}`](experiments/{name}/README.md) | TODO | not measured | |\n")
    return "".join(lines)
