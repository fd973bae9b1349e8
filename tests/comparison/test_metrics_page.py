"""The table of all metrics."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from metrics_page import Row, rows

from experiments.comparison.figures import limits_of

ROOT = Path(__file__).parents[2]
TOPICS = {topic for row in rows() for topic in row.topics}


def test_figures_cut_no_interval_that_a_metric_can_have():
    narrower = [row for row in rows() if limits_of(row.example)[0] > row.low or limits_of(row.example)[1] < row.high]
    assert not narrower


def test_every_topic_and_every_name_of_the_table_is_in_the_code():
    assert all((ROOT / "lightning_modules" / topic).is_dir() for topic in TOPICS)
    strings = strings_of_code()
    for row in rows():
        places = {folder for folder in strings if folder not in TOPICS or not row.topics or folder in row.topics}
        assert not [word for word in words_of(row) if not any(has(strings[folder], word) for folder in places)], row


def words_of(row: Row) -> list[str]:
    """Return the words between the slashes and the placeholders of a name."""
    words = re.split(r"/|[A-Z]{2,}|(?<![A-Za-z\d])[A-Z](?![A-Za-z\d])", row.name)
    return [word.strip("_") for word in words if word.strip("_")]


def has(known: set[str], word: str) -> bool:
    """Return whether a word is known, or made of two words that are: `order_accuracy`."""
    ends = (end for end, letter in enumerate(word) if letter == "_")
    return word in known or any(word[:end] in known and word[end + 1 :] in known for end in ends)


def strings_of_code() -> dict[str, set[str]]:
    """Return the words in the strings of the code that are no docstrings, and the names of fields, by folder."""
    found: dict[str, set[str]] = {}
    for package in ("lightning_modules", "datamodules"):
        for file in (ROOT / package).rglob("*.py"):
            folder = file.relative_to(ROOT / package).parts[0]
            found.setdefault(folder, set()).update(word.strip("_") for word in words_in(ast.parse(file.read_text())))
    return found


def words_in(code: ast.Module) -> Iterator[str]:
    docstrings = {node.value for node in ast.walk(code) if isinstance(node, ast.Expr)}
    for node in ast.walk(code):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield from re.findall(r"\w+", node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
