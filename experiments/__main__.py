"""The command: `llm-train`, the same as `python -m experiments`."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

# name: (module with main(args), whether it wants the name too, what it does). Each imports only what it needs.
COMMANDS = {
    "fit": ("experiments.cli", True, "train a model"),
    "validate": ("experiments.cli", True, "measure a checkpoint on the validation data"),
    "test": ("experiments.cli", True, "measure a checkpoint on the test data"),
    "predict": ("experiments.cli", True, "apply a checkpoint to new data"),
    "generate": ("experiments.generate", False, "continue a prompt with the model of a run"),
    "schema": ("experiments.editor", False, "print the JSON schema of the YAML files, for editors"),
    "completion": ("experiments.editor", True, "print a completion script for the shell"),
}

HELP = f"""usage: llm-train COMMAND [options]

Train language models from YAML. Try it:

  llm-train fit -c experiments/decoder_pretrain/offline.yaml
  llm-train fit -c experiments/decoder_pretrain/offline.yaml --optimizer.lr 1e-3 --trainer.max_steps 100

commands:
{chr(10).join(f"  {name:<12}{does}" for name, (_, _, does) in COMMANDS.items())}

Every command has its own --help. LLM_TRAIN_TRACEBACK=1 shows where in the code an error comes from.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake costs one line and exit code 1 or 2.

    Args:
        args: Command line; `None` for the process's own.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if args[0] not in COMMANDS:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
        sys.exit(_error(f"no such command: {args[0]!r} ({hint})", 2))
    module, with_name, _ = COMMANDS[args[0]]
    run = importlib.import_module(module).main
    if os.environ.get("LLM_TRAIN_TRACEBACK"):
        run(args if with_name else args[1:])
        return

    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        run(args if with_name else args[1:])
    except MisconfigurationException as error:
        sys.exit(_error(str(error), 1))
    except OSError as error:  # a missing file, a full disk, a folder that cannot be written: the message names it
        sys.exit(_error(str(error), 1))


def _error(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
