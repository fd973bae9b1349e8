"""Help for editors and shells: the JSON schema of the YAML files, and a completion script."""

from collections.abc import Sequence

from experiments.cli import ExperimentCLI
from experiments.errors import CommandParser
from experiments.parser import ExperimentParser


class _Describing(ExperimentCLI):
    """Prints a description of its parser instead of parsing."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__([])

    def parse_arguments(self, parser: ExperimentParser, args: Sequence[str]) -> None:
        """Prints and leaves."""
        described = self._subcommand_parsers["fit"] if self.kind == "jsonschema" else parser
        print(described.get_completion_script(self.kind))
        raise SystemExit(0)


def main(args: Sequence[str]) -> None:
    """Prints the schema of `fit`'s YAML, or a completion script.

    Args:
        args: `schema`, or `completion` and the shell.
    """
    parser = CommandParser(prog=f"llm-train {args[0]}")
    if args[0] == "schema":
        parser.description = (
            "Print the JSON schema of the YAML files. Editors take it as `# yaml-language-server: $schema=FILE`."
        )
        parser.parse_args(args[1:])
        _Describing("jsonschema")
    else:
        parser.description = 'Print a completion script; `eval "$(llm-train completion bash)"` switches it on.'
        parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
        _Describing(f"shtab-{parser.parse_args(args[1:]).shell}")
