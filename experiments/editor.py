"""`llm-train schema` and `llm-train completion`: the JSON schema of the YAML files, and a script for the shell."""

import json
from collections.abc import Sequence

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
            schema = json.loads(described)
            schema["$defs"]["Module"] = {}  # accept any network: see below
            described = json.dumps(schema, indent=2)
        print(described)
        raise SystemExit(0)


def main(args: Sequence[str]) -> None:
    """Print the schema of the YAML of `fit`, or a completion script."""
    parser = CommandParser(prog=f"llm-train {args[0]}")
    if args[0] == "schema":
        parser.description = (
            "Print the JSON schema of the YAML files. Editors use it by `# yaml-language-server: $schema=FILE`."
        )
        parser.parse_args(args[1:])
        # Callbacks of Lightning take any network; a list of those of torch and torchmetrics would be most of the file.
        set_parsing_settings(subclasses_disabled=[lambda kind: kind is torch.nn.Module])
        _Description(["fit"], "jsonschema")
    else:
        parser.description = 'Print a completion script; `eval "$(llm-train completion bash)"` enables it.'
        parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
        _Description([], f"shtab-{parser.parse_args(args[1:]).shell}")
