"""Class paths of this project, also those of configurations that an earlier version wrote."""

import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments import trust
from experiments.help import index
from experiments.yaml_files import check_yaml


def import_class(class_path: str, verdicts: Mapping[str, bool] | None = None) -> type:
    """Return the class that a configuration names, such as `lightning_modules.TOPIC.MODULE`.

    Args:
        class_path: Name of the class, also one that an earlier version wrote.
        verdicts: Which classes the configuration may name, see `experiments.trust.check`.

    Raises:
        MisconfigurationException: If there is no such class, or the configuration may not name it, see
            `experiments.trust`.
    """
    trust.check(current(class_path), verdicts)
    module, _, name = current(class_path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise MisconfigurationException(f"class_path: {class_path} could not be imported ({error})") from error
    if not inspect.isclass(found):
        raise MisconfigurationException(f"class_path: {class_path} is no class")
    trust.check(f"{found.__module__}.{found.__qualname__}", verdicts)  # a module may have imported it
    return found


@functools.cache
def current(class_path: str) -> str:
    """Return the current path of a class, found by its name if it has moved since the configuration was written.

    Class names are unique in the project, so the name is enough. The path is returned as it is if its module has the
    class, if no other module has it, or if it belongs to another package.
    """
    module, _, name = class_path.rpartition(".")
    top = module.split(".")[0]
    if top not in index.OWN or re.search(rf"\b{re.escape(name)}\b", index.source(module)):
        return class_path
    definition = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    files = sorted((index.ROOT / top).rglob("*.py"))
    found = [file for file in files if definition.search(file.read_text(encoding="utf-8"))]
    return ".".join([*found[0].relative_to(index.ROOT).with_suffix("").parts, name]) if len(found) == 1 else class_path


def accept_moved_classes() -> None:
    """Make jsonargparse accept the class paths of earlier versions, and refuse a key twice, in all YAML it reads.

    The value `None` of a flag is null: jsonargparse writes null so when it passes a flag on to a class within a class.
    """
    load = get_loader("yaml")

    def load_checked(text: str) -> Any:
        if text == "None":
            return None
        check_yaml(text)
        return _current(load(text))

    set_loader("yaml", load_checked, exceptions=(yaml.YAMLError,))


def _current(value: Any) -> Any:
    """Return a configuration with current class paths, and with each list `key+` added to a list `key` beside it."""
    if isinstance(value, list):
        return [_current(item) for item in value]
    if not isinstance(value, dict):
        return value
    config = {
        key: current(item) if key == "class_path" and isinstance(item, str) else _current(item)
        for key, item in value.items()
    }
    for key in [key for key in config if isinstance(key, str) and f"{key}+" in config]:
        first, more = config[key], config.pop(f"{key}+")  # jsonargparse would lose the first
        config[key] = [*(first if isinstance(first, list) else [first]), *(more if isinstance(more, list) else [more])]
    return config
