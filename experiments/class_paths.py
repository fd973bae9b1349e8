"""Where a class of this project is, also when a configuration names the place where it was in an earlier version."""

import importlib
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_ROOT = Path(__file__).parents[1]
_ROOMS = ("lightning_modules", "datamodules")


def import_class(class_path: str) -> type:
    """Return the class that a configuration names.

    Args:
        class_path: Dotted path, such as `lightning_modules.bpe.BPEModule`.
    """
    module, name = current(class_path).rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def current(class_path: str) -> str:
    """Return the path of a class, found by its name if its module has moved since the configuration was written.

    The names of classes are unique in the project, so the name is enough. A path that leads somewhere, and one of
    another package, is returned as it is.

    Args:
        class_path: Dotted path of a class.
    """
    module, _, name = class_path.rpartition(".")
    place = _ROOT / module.replace(".", "/")
    if module.split(".")[0] not in _ROOMS or place.is_dir() or place.with_suffix(".py").is_file():
        return class_path
    definition = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    room = _ROOT / module.split(".")[0]
    found = [file for file in sorted(room.rglob("*.py")) if definition.search(file.read_text(encoding="utf-8"))]
    if len(found) != 1:
        return class_path
    return ".".join([*found[0].relative_to(_ROOT).with_suffix("").parts, name])


def accept_moved_classes() -> None:
    """Let every YAML that jsonargparse reads name classes by the paths of earlier versions."""
    load = get_loader("yaml")
    set_loader("yaml", lambda text: _with_current_paths(load(text)), exceptions=(yaml.YAMLError,))


def _with_current_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_current_paths(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: current(item) if key == "class_path" and isinstance(item, str) else _with_current_paths(item)
        for key, item in value.items()
    }
