"""What a YAML can name of a module: its imports and classes, read from source text and kept in the cache."""

import ast
import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_modules.common.cache import cache_root
from lightning_modules.common.files import write_json

_SELF = ("self", "cls")
_FILE = "source_text.json"  # in the cache


@dataclass(frozen=True)
class Parameter:
    """An argument of a constructor or function, as its source has it."""

    name: str
    type: str = ""
    default: str | None = None  # `None` if it has none
    help: str = ""


@dataclass
class Function:
    """A method."""

    docstring: str
    parameters: list[Parameter]
    is_open: bool  # whether it has arguments in a star
    is_abstract: bool


@dataclass
class Definition:
    """A class."""

    docstring: str
    bases: list[str]
    is_dataclass: bool
    fields: list[Parameter]
    functions: dict[str, Function]


@dataclass
class Module:
    """A module.

    Attributes:
        imports: What it imports at its top: full names, with leading dots if relative, by the names in the module.
        literals: Types that have few values, as `Literal['a', 'b']`, by name.
        classes: Classes by name.
    """

    imports: dict[str, str] = field(default_factory=dict)
    literals: dict[str, str] = field(default_factory=dict)
    classes: dict[str, Definition] = field(default_factory=dict)


# By file: its time and size, and the module as JSON has it. `None` outside of a block of `kept_in_cache`.
_kept: dict[str, list[Any]] | None = None


@contextlib.contextmanager
def kept_in_cache() -> Iterator[None]:
    """Read the modules that the cache has in the block, and add those that are parsed in it.

    A cache that is damaged, of another version or cannot be written only costs time.
    """
    global _kept
    made_by = [sys.version, *_state(Path(__file__))]
    _kept = {}
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError, RuntimeError):
        content = json.loads((cache_root() / _FILE).read_text(encoding="utf-8"))
        if content["made_by"] == made_by:
            _kept.update(content["modules"])
    before = dict(_kept)
    try:
        yield
    finally:
        if _kept != before:
            present = {name: entry for name, entry in _kept.items() if Path(name).is_file()}
            with contextlib.suppress(OSError, RuntimeError):
                write_json(cache_root() / _FILE, {"made_by": made_by, "modules": present}, indent=None)
        _kept = None


@functools.cache
def read(file: Path) -> Module:
    """Return what is in a source file; nothing if it is no Python."""
    state = _state(file)
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):  # none, or a damaged one
        *kept_state, content = (_kept or {})[str(file)]
        if kept_state == state:
            return _from_json(content)
    try:
        module = _read(ast.parse(file.read_bytes()))
    except (SyntaxError, ValueError):
        module = Module()
    if _kept is not None:
        _kept[str(file)] = [*state, asdict(module)]
    return module


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_mtime_ns, status.st_size]


def _from_json(content: dict[str, Any]) -> Module:
    classes = {name: Definition(**kind) for name, kind in content["classes"].items()}
    for kind in classes.values():
        kind.fields = [Parameter(**given) for given in kind.fields]  # type: ignore[arg-type]
        kind.functions = {name: Function(**given) for name, given in kind.functions.items()}  # type: ignore[arg-type]
        for function in kind.functions.values():
            function.parameters = [Parameter(**given) for given in function.parameters]  # type: ignore[arg-type]
    return Module(content["imports"], content["literals"], classes)


def _read(tree: ast.Module) -> Module:
    module = Module(_imports(tree))
    for item in tree.body:
        if isinstance(item, ast.ClassDef):
            module.classes[item.name] = _definition(item)
        elif isinstance(item, ast.Assign) and "Literal[" in (value := ast.unparse(item.value)):
            module.literals |= {ast.unparse(target): value for target in item.targets}
    return module


def _imports(tree: ast.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    statements = list(tree.body)
    while statements:
        statement = statements.pop(0)
        if isinstance(statement, ast.If | ast.Try):
            statements += [*statement.body, *statement.orelse]
        elif isinstance(statement, ast.Import):
            found |= {alias.asname: alias.name for alias in statement.names if alias.asname}
        elif isinstance(statement, ast.ImportFrom):
            start = "." * statement.level + (f"{statement.module}." if statement.module else "")
            found |= {alias.asname or alias.name: f"{start}{alias.name}" for alias in statement.names}
    return found


def _definition(node: ast.ClassDef) -> Definition:
    functions = {item.name: _function(item) for item in reversed(node.body) if isinstance(item, ast.FunctionDef)}
    items = (item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name))
    return Definition(
        ast.get_docstring(node) or "",
        [ast.unparse(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases],
        any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list),
        [_parameter(ast.unparse(item.target), item.annotation, item.value) for item in items],
        functions,
    )


def _function(node: ast.FunctionDef) -> Function:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return Function(
        ast.get_docstring(node) or "",
        [_parameter(arg.arg, arg.annotation, default) for arg, default in pairs if arg.arg not in _SELF],
        arguments.kwarg is not None or arguments.vararg is not None,
        any("abstract" in ast.unparse(decorator) for decorator in node.decorator_list),
    )


def _parameter(name: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    return Parameter(name, ast.unparse(annotation) if annotation else "", ast.unparse(default) if default else None)
