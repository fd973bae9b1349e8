"""`llm-train schema` and `llm-train completion`: the JSON schema of the YAML files, and a script for the shell."""

from collections.abc import Sequence

from experiments.cli import ExperimentCLI
from experiments.errors import CommandParser
from experiments.parser import ExperimentParser


class _Description(ExperimentCLI):
    """Prints a description of the options instead of parsing.

    Args:
        args: Subcommand whose options are described; nothing for those of all subcommands.
        kind: Name that jsonargparse gives to the description.
    """

    def __init__(self, args: Sequence[str], kind: str) -> None:
        self._kind = kind
        super().__init__(args)

    def parse_arguments(self, parser: ExperimentParser, args: Sequence[str]) -> None:
        """Print the description, and exit.

        Args:
            parser: Parser of the command.
            args: As for the class.

        Raises:
            SystemExit: Always.
        """
        described = self.parser_of(args[0]) if args else parser
        print(described.get_completion_script(self._kind))
        raise SystemExit(0)


def main(args: Sequence[str]) -> None:
    """Print the schema of the YAML of `fit`, or a completion script.

    Args:
        args: `schema`, or `completion` and the shell.
    """
    parser = CommandParser(prog=f"llm-train {args[0]}")
    if args[0] == "schema":
        parser.description = (
            "Print the JSON schema of the YAML files. Editors use it by `# yaml-language-server: $schema=FILE`."
        )
        parser.parse_args(args[1:])
        _Description(["fit"], "jsonschema")
    else:
        parser.description = 'Print a completion script; `eval "$(llm-train completion bash)"` enables it.'
        parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
        _Description([], f"shtab-{parser.parse_args(args[1:]).shell}")
