"""A parser whose errors fit on a line: where, what is wrong, and what may have been meant."""

import difflib
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from experiments.class_paths import accept_moved_classes

# `lr: float | Tensor` would otherwise list eleven tensor classes in the help and in the JSON schema.
set_parsing_settings(subclasses_disabled=[torch.Tensor, type])
accept_moved_classes()

_UNKNOWN_OPTION = re.compile(r"(?:does not accept option|Option) '([\w.]+)'|unrecognized arguments: --([\w.]+)")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_CLASS_PATH = re.compile(r"class_path[ =]'([\w.]+)'")
_KEY = re.compile(r'Parser key "([^"]+)":')
# What jsonargparse says around the reason: the types it tried, the whole value, what it is not either.
_AROUND = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but|$)"
)


class ExperimentParser(LightningArgumentParser):
    """LightningCLI's parser, with errors of one line and no abbreviations.

    Args:
        *args: As for `LightningArgumentParser`.
        **kwargs: As for `LightningArgumentParser`.
    """

    command_line: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # --trainer.max_epoch must not pass for --trainer.max_epochs
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str], *rest: Any, **kwargs: Any) -> Namespace:
        """Parses, and remembers the command line for the errors.

        Args:
            args: Command line.
            *rest: As for `ArgumentParser`.
            **kwargs: As for `ArgumentParser`.
        """
        ExperimentParser.command_line = list(args)
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one line and leaves with exit code 2.

        Args:
            message: What jsonargparse has to say, often many lines of it.
            ex: The exception behind it.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        options = [action.dest for action in (getattr(ex, "subcommand_parser", None) or self)._actions]
        sys.stderr.write(f"error: {one_line(message, options, self.command_line)}\n")
        self.exit(2)


def one_line(message: str, options: Sequence[str], command_line: Sequence[str]) -> str:
    """Cuts a message of jsonargparse down to where, what, and what may have been meant.

    Args:
        message: The message, an indented tree of all that was tried.
        options: Names of the options of the subcommand.
        command_line: The command line, whose configuration files are looked through.
    """
    key = ".".join(_KEY.findall(message))
    reasons = [line.strip().removeprefix("- ") for line in _KEY.sub("", message).splitlines()]
    reasons = [_plain(reason) for reason in reasons if not _AROUND.match(reason)]
    what = "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or "is not valid"

    # What the reader is likely to have typed wrong: a class, an option of a class, or an option of the command.
    typed = key.rsplit(".", 1)[-1]
    candidates: Sequence[str] = ()
    if missing := _NO_ATTRIBUTE.search(message):
        typed, candidates = missing[2], dir(importlib.import_module(missing[1]))
    elif unknown := _UNKNOWN_OPTION.search(message):
        typed = unknown[1] or unknown[2]
        if class_path := _CLASS_PATH.search(message):
            candidates = _arguments(class_path[1])
        elif (section := typed.split(".")[0]) not in {option.split(".")[0] for option in options}:
            typed, candidates = section, [option.split(".")[0] for option in options]
        else:
            candidates = options
    close = difflib.get_close_matches(typed, candidates, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{_place(typed, command_line)}{key + ': ' if key else ''}{what}{hint}"


def _plain(reason: str) -> str:
    reason = re.sub(r"^Type .* expects a function or a callable class: ?", "", reason)
    reason = re.sub(r"\.? Got value: (Namespace|NestedArg)\(.*", "", reason)
    reason = re.sub(r"^Problem with given class_path '([\w.]+)':$", r"\1", reason)
    reason = re.sub(r"Expected a <class '([\w.]+)'>", r"expected \1", reason)
    reason = re.sub(
        r"Expected a dot import path string: (.*)", r"\1 is no class path such as package.module.Class", reason
    )
    return re.sub(r"\. Got value: (.*)", r", got \1", reason)


def _arguments(class_path: str) -> list[str]:
    module, name = class_path.rsplit(".", 1)
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)


def _place(typed: str, command_line: Sequence[str]) -> str:
    """The first line of a configuration file on the command line that has a key of this name, or is no YAML at all."""
    key = re.compile(rf"\b{re.escape(typed.rsplit('.', 1)[-1])}\+?:") if typed else None
    for flag, value in itertools.pairwise(command_line):
        if flag not in ("-c", "--config") or not Path(value).is_file():
            continue
        text = Path(value).read_text(errors="replace")
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError:
            return f"{value}: "
        if not isinstance(content, dict | None):
            return f"{value}: "
        for number, line in enumerate(text.splitlines(), start=1):
            if key and key.search(line.split("#")[0]):
                return f"{value}, line {number}: "
    return ""
