"""`llm-train schema` and `llm-train completion`: the JSON schema of the YAML files, and a script for the shell."""

import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import set_parsing_settings

from experiments.cli import ExperimentCLI
from experiments.errors import CommandParser
from experiments.parser import ExperimentParser


class _Description(ExperimentCLI):
    """Prints a description of the options of a subcommand, or of all subcommands, instead of parsing.

    Args:
        args: Subcommand; empty for all.
        kind: Name that jsonargparse gives to the description.
    """

    def __init__(self, args: Sequence[str], kind: str) -> None:
        self._kind = kind
        super().__init__(args)

    def parse_arguments(self, parser: ExperimentParser, args: Sequence[str]) -> None:
        """Print the description, and exit."""
        described = (self.parser_of(args[0]) if args else parser).get_completion_script(self._kind)
        if self._kind == "jsonschema":
            described = json.dumps(_of_yaml(json.loads(described)), indent=1)
        print(described)
        raise SystemExit(0)


_FOLDERS = ("lightning_modules", "datamodules")
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
    for folder in map(importlib.import_module, _FOLDERS):
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
    return _without_schema_keys(schema)


def _paths(class_path: str) -> list[str]:
    """Return the import paths of a class: the given one, where it is defined, and packages that re-export it."""
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    parts = kind.__module__.split(".")
    modules = [module, *(".".join(parts[:length]) for length in range(len(parts), 0, -1))]
    return list(dict.fromkeys(f"{m}.{name}" for m in modules if getattr(sys.modules.get(m), name, None) is kind))


def _without_schema_keys(value: Any) -> Any:
    """Return a schema without the key `$schema` that jsonargparse lets every section have, which doubles its size."""
    if isinstance(value, list):
        return [_without_schema_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_schema_keys(item) for key, item in value.items() if key != "$schema" or not isinstance(item, dict)
    }


def main(args: Sequence[str]) -> None:
    """Print the schema of the YAML of `fit`, or a completion script."""
    parser = CommandParser(prog=f"llm-train {args[0]}")
    if args[0] == "schema":
        parser.description = (
            "Print the JSON schema of the YAML files. Editors use it by `# yaml-language-server: $schema=FILE`."
        )
        parser.parse_args(args[1:])
        _import_all()
        # Callbacks of Lightning take any network; a list of those of torch and torchmetrics would be most of the file.
        set_parsing_settings(subclasses_disabled=[lambda kind: kind is torch.nn.Module])
        _Description(["fit"], "jsonschema")
    else:
        parser.description = 'Print a completion script; `eval "$(llm-train completion bash)"` enables it.'
        parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
        _Description([], f"shtab-{parser.parse_args(args[1:]).shell}")
