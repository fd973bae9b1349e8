"""`llm-train schema`: the JSON schema of the YAML files, for editors."""

import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings

from experiments.cli import ExperimentCLI
from experiments.errors import CommandParser
from experiments.help import index
from experiments.parser import ExperimentParser


class _Description(ExperimentCLI):
    """Prints the JSON schema of the options of a subcommand instead of parsing."""

    def parse_arguments(self, parser: ExperimentParser, args: Sequence[str]) -> None:
        """Print the schema, and exit."""
        described = self.parser_of(args[0]).get_completion_script("jsonschema")
        print(json.dumps(_of_yaml(json.loads(described)), indent=1))
        raise SystemExit(0)


# Arguments that the module passes to an optimiser or schedule, which a YAML leaves out.
_PASSED = {"Optimizer": ["params"], "StepSchedule": ["optimizer", "total_steps"], "LRScheduler": ["optimizer"]}
_OTHERS = [  # a class of the user, and arguments of the class that an earlier file names
    {
        "type": "object",
        "properties": {
            "class_path": {
                "type": "string",
                "not": {"pattern": r"^(lightning_modules|datamodules|torch\.optim|lightning\.pytorch)\."},
            }
        },
        "required": ["class_path"],
    },
    {"type": "object", "not": {"required": ["class_path"]}},
]


def _import_all() -> None:
    """Import every module of the project: the schema lists the classes that are loaded."""
    for folder in map(importlib.import_module, index.OWN):
        for module in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
            importlib.import_module(module.name)


def _of_yaml(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of jsonargparse, changed to that of our YAML: a file may hold a part of the settings."""
    schema.pop("required", None)
    definitions = schema["$defs"]
    definitions["Module"] = {}  # accept any network: see below
    for name, passed in _PASSED.items():
        for kind in definitions.get(name, {}).get("anyOf", ()):
            arguments = kind.get("properties", {}).get("init_args", {})
            arguments["required"] = [key for key in arguments.get("required", ()) if key not in passed]
            if not arguments["required"]:
                kind["required"] = ["class_path"]
    trainer = schema["properties"]["trainer"]
    trainer.pop("required", None)
    for name in ("callbacks", "logger", "plugins"):
        trainer["properties"][f"{name}+"] = trainer["properties"][name]
    schema["properties"]["trainer"] = {"anyOf": [{"type": "string"}, trainer]}  # or another file
    for definition in definitions.values():
        kinds = definition.get("anyOf", ())
        if any("class_path" in kind.get("properties", {}) for kind in kinds):
            for kind in kinds:
                if (path := kind.get("properties", {}).get("class_path", {}).get("const")) is not None:
                    kind["properties"]["class_path"] = {"enum": _paths(path)}
            kinds += _OTHERS
    return _cleaned(schema)


def _paths(class_path: str) -> list[str]:
    """Return the import paths of a class: the given one, where it is defined, and packages that re-export it."""
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    parts = kind.__module__.split(".")
    modules = [module, *(".".join(parts[:length]) for length in range(len(parts), 0, -1))]
    return list(dict.fromkeys(f"{m}.{name}" for m in modules if getattr(sys.modules.get(m), name, None) is kind))


def _cleaned(value: Any, setting: str = "") -> Any:
    """Return a schema without what doubles its size, and without defaults of this machine and this process.

    jsonargparse lets every section have the key `$schema`.

    Args:
        value: The schema, or a part of it.
        setting: Key of the part.
    """
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _cleaned(item, key)
        for key, item in value.items()
        if not (key == "$schema" and isinstance(item, dict))
        and not (key == "default" and _is_of_this_process(setting, item))
    }


def _is_of_this_process(setting: str, default: Any) -> bool:
    """Return whether a default is a folder of this machine, an object by its address, or the number of this process."""
    folders = tuple(str(folder) for folder in (Path.home(), Path.cwd()) if folder.name)
    if isinstance(default, str):
        return default.startswith(folders) or " object at 0x" in default
    return setting == "x_stats_pid"  # of W&B


def main(args: Sequence[str]) -> None:
    """Print the schema of the YAML of `fit`."""
    parser = CommandParser(
        prog="llm-train schema",
        description="Print the JSON schema of the YAML files. Editors use it by "
        "`# yaml-language-server: $schema=FILE`.",
    )
    parser.parse_args(args[1:])
    _import_all()
    # Callbacks of Lightning take any network; a list of those of torch and torchmetrics would be most of the file.
    set_parsing_settings(subclasses_disabled=[lambda kind: kind is torch.nn.Module])
    _Description(["fit"])
