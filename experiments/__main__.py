"""The command: `llm-train`, the same as `python -m experiments`."""

import sys

if __name__ == "__main__" and sys.path and not sys.flags.safe_path:
    # `python -m` imports from the working folder, which can be a stranger's; `llm-train` does not.
    sys.path[0] = __file__.rpartition("experiments")[0]

import difflib
import importlib
import io
import locale
import os
import traceback
from collections.abc import Sequence

from experiments.errors import (
    UsageError,
    UserError,
    causes,
    is_of_user,
    module_that_raised,
    place_in_users_code,
    raised_by_constructor,
)

# name: (module with main(args), description). A module is imported when its command is called.
COMMANDS = {
    "fit": ("experiments.cli", "train a model"),
    "validate": ("experiments.cli", "evaluate a checkpoint on the validation data"),
    "test": ("experiments.cli", "evaluate a checkpoint on the test data"),
    "predict": ("experiments.cli", "apply a checkpoint to new data"),
    "prepare": ("experiments.prepare", "fetch and tokenise what an experiment reads, ahead of its runs"),
    "estimate": ("experiments.estimate", "estimate the memory, time and disk of a run"),
    "generate": ("experiments.generate", "continue a prompt with the model of a run, or ask it questions"),
    "study": ("experiments.study.command", "run a W&B sweep file on this machine or a cluster"),
    "compare": ("experiments.comparison.command", "compare runs: tables with intervals, curves, and a page"),
    "list": ("experiments.help.listing", "list topics, experiments, studies and classes, one line each"),
    "claims": ("experiments.claims.command", "check the claims of the experiments against records of runs"),
    "new": ("experiments.new_topic.command", "write a small working topic, to be replaced by your own"),
    "copy": ("experiments.copy_experiment", "copy an experiment, study or preset, to be edited"),
    "convert": ("experiments.convert", "make whole files of checkpoints that were saved in shards"),
    "schema": ("experiments.help.editor", "print the JSON schema of the YAML files, for editors"),
    "completion": ("experiments.help.completion", "print a completion script for the shell"),
}

# What others call a command, or an earlier version did.
_OTHER_NAMES = {"new-topic": "new", "train": "fit", "evaluate": "validate", "sample": "generate", "sweep": "study"}

_REFUSALS = (ValueError, TypeError, AttributeError, ImportError)  # of Lightning, for settings that it does not accept

# Texts of errors of other classes: of a full disk, and of `~name/file` for a user who does not exist.
_OF_FILES = ("No space left on device", "Could not determine home directory")

# Texts of torch's errors of general classes for tensors that the memory cannot hold.
_OF_MEMORY = ("can't allocate memory", "not enough memory", "error: out of memory", "Storage size calculation overflow")

HELP = f"""usage: llm-train COMMAND [options]

Train language models from YAML. Try it:

  llm-train fit -c TOPIC/offline
  llm-train fit -c TOPIC/offline --optimizer.lr 1e-3 --trainer.max_steps 100

commands:
{chr(10).join(f"  {name:<12}{does}" for name, (_, does) in COMMANDS.items())}

Every command has its own --help; --version prints the versions. LLM_TRAIN_TRACEBACK=1 shows where in the code an error
comes from.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; a mistake of the user prints one line and exits with code 1 or 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: some consoles have few characters
    if args is None and os.name == "posix" and locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"):
        # In another locale, libraries would read and write files in its encoding. Python 3.15 always has this mode.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    args = list(sys.argv[1:] if args is None else args)
    if unreadable := next((arg for arg in args if not _is_text(arg)), None):
        encoding = sys.getfilesystemencoding()
        sys.exit(_error(f"argument {unreadable!r} is not {encoding}; use UTF-8, with PYTHONUTF8=1 if need be", 2))
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if "--version" in args[:2] or args[0] == "version":
        print(_versions())
        return
    if args[0].startswith("-") and (command := next(filter(COMMANDS.__contains__, args), None)):
        sys.exit(_error(f"{args[0]}: flags follow the command, llm-train {command} {args[0]} ...", 2))
    if args[0] not in COMMANDS:
        close = difflib.get_close_matches(args[0], [*COMMANDS, *_OTHER_NAMES], n=1)
        close = [_OTHER_NAMES.get(name, name) for name in close]
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}"
        sys.exit(_error(f"no such command: {args[0]!r} ({hint})", 2))
    if os.environ.get("LLM_TRAIN_TRACEBACK"):
        _run(args)
        return

    try:
        _run(args)
        sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit) as leave:  # before the training, or in a command that does not train
        if not isinstance(leave, KeyboardInterrupt) and not isinstance(leave.__context__, KeyboardInterrupt):
            raise
        sys.exit(_error("stopped by Ctrl-C", 130))
    except BrokenPipeError:  # the reader of the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None:  # an error of this program, or in the user's own code: show the traceback
            if raised := raised_by_constructor(error):
                raise raised from raised.__cause__ or raised.__context__
            raise
        sys.exit(_error(str(mistake), 2 if isinstance(mistake, UsageError) else 1))


def _versions() -> str:
    import importlib.metadata  # here, because the import would slow down each command and each TAB

    packages = ("llm-train", "torch", "lightning", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{versions}, Python {sys.version.split()[0]}"


def _run(args: Sequence[str]) -> None:
    module = _module_of(args)
    if module == "experiments.cli":  # whose import takes seconds: a name that is none is answered before it
        from experiments import names

        names.with_files(args)
    importlib.import_module(module).main(args)


def _module_of(args: Sequence[str]) -> str:
    """Return the module that runs a command line; that of a help imports neither PyTorch nor Lightning."""
    module = COMMANDS[args[0]][0]
    asks_for_help = any(arg in ("-h", "--help") or arg.partition("=")[0].endswith(".help") for arg in args[1:])
    return "experiments.help.describe" if module == "experiments.cli" and asks_for_help else module


def _mistake_behind(error: BaseException) -> BaseException | None:
    """Return the mistake of the user that an error comes from, or `None`.

    A mistake is a `UserError`, a `MisconfigurationException`, also one that a library has wrapped, or an `OSError`: a
    missing file, a full disk, a folder that cannot be written. So is what needs more memory than there is. It is also
    an error that Lightning itself raises, which refuses settings of the trainer with several classes of exceptions, and
    any error of one of its callbacks. These two are none if they have passed code of the user: it is to be mended
    there.
    """
    # Libraries in Rust have errors of their own.
    if isinstance(error, OSError) or any(text in str(error) for text in _OF_FILES) or _is_refused_by_lightning(error):
        return error
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")  # not imported: not raised
    mistakes = (UserError, lightning.MisconfigurationException) if lightning else UserError
    behind = next((cause for cause in causes(error) if isinstance(cause, mistakes)), None)
    if behind is None and (lacking := next(filter(_is_of_memory, causes(error)), None)):
        reason = ". ".join(str(lacking).split(". ")[:2]) or type(lacking).__name__
        return UserError(
            f"the memory is not enough ({reason}): give a smaller model or data.batch_size; `llm-train estimate` "
            "counts what a run needs, and LLM_TRAIN_TRACEBACK=1 shows where in the code it ended"
        )
    if behind is None and (callback := _callback_behind(error)):
        reason = traceback.format_exception_only(error)[-1]
        return UserError(f"the callback {callback} does not go with this run: {reason}")
    return behind


def _is_refused_by_lightning(error: BaseException) -> bool:
    raised_there = isinstance(error, _REFUSALS) and module_that_raised(error).startswith("lightning.")
    return raised_there and place_in_users_code(error) is None


def _is_of_memory(error: BaseException) -> bool:
    """Return whether there was no memory left, of the machine or of its GPU."""
    general = isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_MEMORY)
    return general or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _callback_behind(error: BaseException) -> str | None:
    """Return the class of the callback of Lightning that raises an error, itself or in a library that it calls."""
    own = ("lightning", "experiments", "lightning_modules", "datamodules")
    places = [place for place, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(place.f_globals.get("__name__")) for place in places]
    ours = (i for i, name in enumerate(names) if name.split(".")[0] in own or is_of_user(places[i]))
    last = max(ours, default=None)
    if last is None or not names[last].startswith("lightning.pytorch.callbacks."):
        return None
    callback = type(places[last].f_locals.get("self"))
    return callback.__name__ if callback.__module__.startswith("lightning.") else None


def _is_text(argument: str) -> bool:
    """Return whether an argument is text; bytes that the console's encoding does not have are surrogates in it."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _error(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
