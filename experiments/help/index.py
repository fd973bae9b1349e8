"""Classes that a YAML can name, with their arguments, read from source text without an import.

Importing PyTorch and Lightning takes seconds. The help, the lists, the completion and the hints of error messages need
names and docstrings only, and parsing the files takes a tenth of that, or less if the cache has them.
"""

import functools
import importlib.util
import itertools
import re
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.help import source_text
from experiments.help.source_text import Definition, Function, Module, Parameter

ROOT = Path(__file__).parents[2]
OWN = ("lightning_modules", "datamodules")  # packages of the classes of this project
_FOLLOWED = ("lightning.", "torch.optim.", *(f"{package}." for package in (*OWN, "experiments")))  # with their bases
_MOST_FILES = 200  # of a package that is searched for classes of the user
_BASE = re.compile(r"^Base |\bbase (class|logic)\b")  # the docstrings of classes that others derive from
_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`|``([^`]+)``|`([^`<]+?)\s*<\w+:[^>]*>`_+")  # of reStructuredText


@dataclass(frozen=True)
class Class:
    """A class in a file of source text."""

    defined: str  # module and name
    definition: Definition = field(compare=False)

    @property
    def name(self) -> str:
        """Name without the module."""
        return self.defined.rpartition(".")[2]

    @property
    def module(self) -> str:
        """Module in which it is defined."""
        return self.defined.rpartition(".")[0]

    @property
    def summary(self) -> str:
        """First sentence of the docstring."""
        return first_sentence(self.definition.docstring)

    @functools.cached_property
    def path(self) -> str:
        """Shortest path by which a YAML names it: packages may re-export it."""
        parts = self.module.split(".")
        packages = (".".join(parts[:length]) for length in range(1, len(parts)))
        return next((f"{p}.{self.name}" for p in packages if self.name in _imports(p)), self.defined)

    @property
    def is_public(self) -> bool:
        """Whether a YAML can name it: neither private, nor a base of others, nor with methods to be implemented."""
        return not (self.name.startswith("_") or _BASE.search(self.summary) or self._abstract())

    def _abstract(self) -> set[str]:
        missing: set[str] = set()
        for kind in reversed(ancestors(self)):
            for name, method in kind.definition.functions.items():
                (missing.add if method.is_abstract else missing.discard)(name)
        return missing


def first_sentence(text: str) -> str:
    """Return the first sentence of a text, in one line."""
    line = _plain(" ".join(text.strip().split("\n\n")[0].split()))
    return re.split(r"(?<=[\w)`'][\w)`'][.?])\s+(?=[A-Z])|(?<=[^\s.]{2}:)\s+(?=-)", line)[0].removesuffix(".")


def _plain(text: str) -> str:
    """Return a text with names in backticks where reStructuredText has roles, links and double backticks."""
    return _ROLE.sub(lambda found: found[1] or (f"`{found[2]}`" if found[2] else found[3]), text)


# --- files and classes ------------------------------------------------------------------------------------------------


def _file(module: str) -> Path | None:
    """Return the source file of a module, or `None`."""
    top, *parts = module.split(".")
    folder = _package(top)
    if folder is None:
        alone = Path(f"{top}.py").absolute()
        return alone if not parts and alone.is_file() else None
    place = folder.joinpath(*parts)
    files = (place / "__init__.py", place.with_suffix(".py")) if parts else (place / "__init__.py",)
    return next(filter(Path.is_file, files), None)


def source(module: str) -> str:
    """Return the source of a module; an empty text if there is none."""
    file = _file(module)
    return file.read_text(encoding="utf-8", errors="replace") if file else ""


def _package(top: str) -> Path | None:
    """Return the folder of a package: of this project, an installed one, or one in the working folder."""
    if top in OWN or top == "experiments":
        return ROOT / top
    installed = _installed(top)
    folder = Path(top).absolute()
    return installed or (folder if (folder / "__init__.py").is_file() else None)


@functools.cache
def _installed(top: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(top)  # does not import a top-level package
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec and spec.origin and spec.submodule_search_locations else None


def _module(module: str) -> Module:
    file = _file(module)
    return source_text.read(file) if file else Module()


@functools.cache
def _imports(module: str) -> dict[str, str]:
    """Return what a module imports at its top: full names by the names that they have in it."""
    file = _file(module)
    package = module if file is not None and file.name == "__init__.py" else module.rpartition(".")[0]
    parts = package.split(".")
    found = {}
    for name, full in _module(module).imports.items():
        rest = full.lstrip(".")
        above = parts[: len(parts) - (len(full) - len(rest)) + 1] if rest != full else []
        found[name] = ".".join([*above, rest])
    return found


@functools.cache
def find(path: str) -> Class | None:
    """Return the class of a path, also one by which a package re-exports it; `None` if there is none."""
    module, _, name = path.rpartition(".")
    for _ in range(6):  # re-exports
        if not module or _file(module) is None:
            return None
        if (definition := _module(module).classes.get(name)) is not None:
            return Class(f"{module}.{name}", definition)
        module, _, name = _imports(module).get(name, "").rpartition(".")
    return None


@functools.cache
def ancestors(kind: Class) -> tuple[Class, ...]:
    """Return a class and its bases, in the order in which attributes are looked up, as far as their source is found."""
    found = {kind.defined: kind}
    for text in kind.definition.bases:
        first, dot, rest = text.partition(".")
        full = _imports(kind.module).get(first, f"{kind.module}.{first}" if not dot else first) + dot + rest
        is_followed = not _installed(full.split(".")[0]) or f"{full}.".startswith(_FOLLOWED)
        if is_followed and (parent := find(full)) is not None:
            found |= {above.defined: above for above in ancestors(parent)}
    return tuple(found.values())


@functools.cache
def classes(package: str) -> tuple[Class, ...]:
    """Return the classes that are defined in a package and below it."""
    init = _file(package)
    if init is None:
        return ()
    files = [init] if init.name != "__init__.py" else sorted(init.parent.rglob("*.py"))
    found = []
    for file in files:
        parts = file.relative_to(init.parent).with_suffix("").parts if init.name == "__init__.py" else ()
        module = ".".join([package, *(part for part in parts if part != "__init__")])
        found += [Class(f"{module}.{name}", definition) for name, definition in source_text.read(file).classes.items()]
    return tuple(found)


def subclasses(base: str, *packages: str) -> list[Class]:
    """Return the public classes of packages that derive from a class, by its path, sorted by their own paths."""
    above = find(base)
    found = [
        kind
        for package in packages
        for kind in classes(package)
        if above is not None and kind != above and above in ancestors(kind) and kind.is_public
    ]
    return sorted(found, key=lambda kind: kind.path)


# --- arguments --------------------------------------------------------------------------------------------------------


@functools.cache
def parameters(kind: Class) -> dict[str, Parameter]:
    """Return the arguments of the constructor of a class, with those that it passes on to its bases."""
    found: dict[str, Parameter] = {}
    documented = {}
    for place in reversed(ancestors(kind)):
        documented |= described(place.definition.docstring)
    is_dataclass = False
    for place in ancestors(kind):
        constructor = place.definition.functions.get("__init__")
        if place.definition.is_dataclass:
            is_dataclass = True
            fields = {p.name: _with_choices(p, place.module) for p in place.definition.fields}
            found = {name: p for name, p in fields.items() if name not in found} | found
        elif constructor is not None and not is_dataclass:
            documented |= described(constructor.docstring)
            found = found | {p.name: p for p in _arguments(constructor, place.module) if p.name not in found}
            if not constructor.is_open:
                break
    return {name: replace(p, help=documented.get(name, p.help)) for name, p in found.items()}


def function(path: str) -> list[Parameter]:
    """Return the arguments of a method, by the path of its class and its name, with their help."""
    owner, _, name = path.rpartition(".")
    kind = find(owner)
    if kind is None or (method := kind.definition.functions.get(name)) is None:
        return []
    documented = described(method.docstring)
    return [replace(p, help=documented.get(p.name, "")) for p in _arguments(method, kind.module)]


def _arguments(method: Function, module: str) -> list[Parameter]:
    """Return the arguments of a method of a module, without those in a star."""
    return [_with_choices(parameter, module) for parameter in method.parameters]


def _with_choices(parameter: Parameter, module: str) -> Parameter:
    kind = re.sub(r"\b[A-Z]\w+\b", lambda found: _choices(module, found[0]), parameter.type)
    return replace(parameter, type=kind)


@functools.cache
def _choices(module: str, name: str) -> str:
    """Return the values that a type of a name stands for, as `Literal['a', 'b']`, or the name of another type."""
    sought = name
    for _ in range(4):
        if (text := _module(module).literals.get(sought)) is not None:
            return text
        module, _, sought = _imports(module).get(sought, "").rpartition(".")
        if not module:
            break
    return name


def described(docstring: str) -> dict[str, str]:
    """Return what a docstring in Google style says of each argument, in one line each."""
    section = re.search(r"^Args?:[^\n]*\n((?:[ \t]+\S.*\n?|\s*\n)+)", docstring, re.MULTILINE)
    found: dict[str, list[str]] = {}
    name = None
    for line in textwrap.dedent(section[1]).splitlines() if section else ():
        if entry := re.match(r"\*{0,2}(\w+)(?: \([^:]*\))?:\s*(.*)", line):
            name, found[entry[1]] = entry[1], [entry[2]]
        elif name is not None:
            found[name].append(line.strip())
    return {name: _plain(" ".join(filter(None, lines))) for name, lines in found.items()}


# --- this project -----------------------------------------------------------------------------------------------------


def topics() -> list[str]:
    """Return the names of the topics that come with the project."""
    return sorted(file.parent.name for file in (ROOT / "experiments").glob("*/offline.yaml"))


def packages_of_user() -> list[str]:
    """Return the packages and modules in the working folder, which a YAML of the user may name."""
    found = [place.stem for place in Path().glob("*.py")]
    for init in Path().glob("*/__init__.py"):
        name = init.parent.name
        is_small = len([*itertools.islice(init.parent.rglob("*.py"), _MOST_FILES + 1)]) <= _MOST_FILES
        if name not in (*OWN, "experiments") and is_small and _installed(name) is None:
            found.append(name)
    return sorted(name for name in found if name.isidentifier())
