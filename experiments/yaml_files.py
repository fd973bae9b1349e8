"""YAML as this project reads it: with plain types only, and without a key that is there twice."""

from argparse import Namespace  # that of jsonargparse is one
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import UserError

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast
_MOST_LEVELS = 100
_MOST_VALUES = 1_000_000  # of a document whose aliases are written out


class RepeatedKey(yaml.MarkedYAMLError):
    """A key of a mapping that is there twice."""


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        UserError: If it is not YAML in UTF-8; the message has the line.
    """
    try:
        return load_yaml(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}{describe(error)}") from error


def load_yaml(text: str) -> Any:
    """Return the content of a YAML document.

    Raises:
        yaml.YAMLError: If it is not YAML, a key of a mapping is there twice, or a value is none that Python has, such
            as the date 2024-02-30.
    """
    loader = LOADER(text)
    try:
        _check_depth(text)
        node = loader.get_single_node()
        _check(node, {})
        return None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark and text[mark.index : mark.index + 1] == "\t":
            raise yaml.MarkedYAMLError(problem="found a tab; use spaces", problem_mark=mark) from error
        raise
    except Exception as error:  # of Python: PyYAML has none of its own for such a value, or for one that is too deep
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def check_yaml(text: str) -> None:
    """Raise a `yaml.YAMLError` if a document is not YAML, or if a key of a mapping is there twice."""
    _check_depth(text)
    _check(yaml.compose(text, LOADER), {})


def walk(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a configuration and all of its parts, each with its key as in a flag: without `init_args`."""
    yield key, config
    config = vars(config) if isinstance(config, Namespace) else config
    parts = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for name, part in parts:
        yield from walk(part, key if name == "init_args" else f"{key}.{name}".removeprefix("."))


def texts_in(content: Any) -> Iterator[str]:
    """Yield all texts in the content of a YAML file, without the keys."""
    return (part for _, part in walk(content) if isinstance(part, str))


def numbered_keys(classes: Sequence[str]) -> list[str]:
    """Return keys for the classes in a list, in which the second of a name has the number 2: `Timer`, `Timer.2`."""
    return [f"{name}.{n}" if (n := classes[: i + 1].count(name)) > 1 else name for i, name in enumerate(classes)]


def describe(error: yaml.YAMLError) -> str:
    """Return the line and the problem of an error of YAML, in one line, to follow the name of the file."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem}"


def _check_depth(text: str) -> None:
    """Refuse a document that is nested so deep that libyaml, which calls itself for each level, ends the process."""
    depth = 0
    for event in yaml.parse(text, LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(problem=f"is nested more than {_MOST_LEVELS} levels deep", problem_mark=mark)


def _check(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Check the keys of a node and of all below it, and return the number of its values with aliases written out.

    Args:
        node: The node; an alias is the node that it stands for.
        sizes: Numbers of the nodes that were counted before, by their identity; 0 for those around this one.
    """
    if node is None:
        return 0
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
        return sizes[id(node)]
    sizes[id(node)], size, lines = 0, 1, {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in lines:
                    first = lines[key.tag, key.value]
                    problem = f"{key.value!r} is there twice, first in line {first}; remove one of the two"
                    raise RepeatedKey(problem=problem, problem_mark=key.start_mark)
                lines[key.tag, key.value] = key.start_mark.line + 1
            size += _check(key, sizes) + _check(value, sizes)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, sizes) for item in node.value)
    if size > _MOST_VALUES:
        problem = f"holds more than {_MOST_VALUES:,} values if its aliases are written out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    sizes[id(node)] = size
    return size
