"""A parser whose errors are one line: where, what is wrong, and a similar name if there is one."""

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

from experiments import trust
from experiments.class_paths import accept_moved_classes, import_class
from lightning_modules.runtime.private_names import option_names

# Without this, the help and the JSON schema list all tensor classes for `lr: float | Tensor`.
set_parsing_settings(subclasses_disabled=[torch.Tensor, type], instantiate_subclass_spec_in_any=False)
accept_moved_classes()
# A default of Lightning can be text of an enumeration, as `Timer(interval=...)`.
yaml.SafeDumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))

_UNKNOWN_OPTION = re.compile(r"(?:does not accept option|Option) '([\w.]+)'|unrecognized arguments: --([\w.]+)")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_CLASS_PATH = re.compile(r"class_path[ =]'([\w.]+)'")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)' entry ")
_KEY = re.compile(r'Parser key "([^"]+)":')
# Lines of a message of jsonargparse that are not the reason: the types it tried, and the whole value.
_AROUND = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but|$)"
)


class ExperimentParser(LightningArgumentParser):
    """The parser of LightningCLI, with errors of one line and without abbreviations."""

    command_line: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # --trainer.max_epoch is an error, not --trainer.max_epochs
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str], *rest: Any, **kwargs: Any) -> Namespace:
        """Parse, with the classes that the command line trusts, and keep the command line for error messages."""
        ExperimentParser.command_line = list(args)
        trust.trust(args)
        return super().parse_args(args, *rest, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        options = option_names(getattr(ex, "subcommand_parser", None) or self)
        sys.stderr.write(f"error: {one_line(message, options, self.command_line)}\n")
        raise SystemExit(2)


def one_line(message: str, options: Sequence[str], command_line: Sequence[str]) -> str:
    """Shorten a message of jsonargparse to one line: where, what is wrong, and a similar name if there is one.

    Args:
        message: The message, an indented tree of the types that were tried.
        options: Names of the options of the subcommand.
        command_line: The command line; its configuration files are searched for the wrong key.
    """
    key = ".".join(_nested_keys(message))
    reasons = [line.strip().removeprefix("- ") for line in _KEY.sub("", message).splitlines()]
    reasons = [_plain(reason) for reason in reasons if not _AROUND.match(reason)]
    # Of several types, those of which the class is no subclass do not matter.
    reasons = [reason for reason in reasons if " to be a subclass of " not in reason] or reasons[-1:]
    what = "; ".join(dict.fromkeys(reason for reason in reasons if reason)) or "is not valid"
    if denied := _DENIED.search(message):  # the other types that were tried do not matter
        what = trust.refusal(*denied.groups())

    # The name that is probably misspelt: a class, an option of a class, or an option of the command.
    typed = key.rsplit(".", 1)[-1]
    candidates: Sequence[str] = ()
    if missing := _NO_ATTRIBUTE.search(message):
        typed, candidates = missing[2], dir(importlib.import_module(missing[1]))
    elif unknown := _UNKNOWN_OPTION.search(message):
        typed = unknown[1] or unknown[2]
        if class_path := _CLASS_PATH.search(message):
            candidates = list(inspect.signature(import_class(class_path[1])).parameters)
        elif (section := typed.split(".")[0]) not in {option.split(".")[0] for option in options}:
            typed, candidates = section, [option.split(".")[0] for option in options]
        else:
            candidates = options
    close = difflib.get_close_matches(typed, candidates, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    flag = _flag_of(key, typed, command_line)
    where = "--" if flag and key else "" if flag else _place(typed, command_line)
    return f"{where}{key + ': ' if key else ''}{what}{hint}"


def _nested_keys(message: str) -> list[str]:
    """Return the keys of a message that lie in one another; those of further types that were tried are left out."""
    keys: list[str] = []
    depth = -1
    for line in message.splitlines():
        found, indent = _KEY.findall(line), len(line) - len(line.lstrip())
        if found and indent <= depth:
            break
        if found:
            keys, depth = keys + found, indent
    return keys


def _flag_of(key: str, typed: str, command_line: Sequence[str]) -> str | None:
    """Return the flag that sets a key, or, if the message has none, the flag with the misspelt name."""
    for word in command_line:
        flag = word.partition("=")[0].removeprefix("--").rstrip("+").replace(".init_args", "")
        if not word.startswith("--") or flag == "config":
            continue
        if key and (flag == key or key.startswith(f"{flag}.") or (typed and flag.startswith(f"{key}.{typed}"))):
            return word
        if not key and typed and f".{flag}".endswith(f".{typed}"):
            return word
    return None


def _plain(reason: str) -> str:
    reason = re.sub(r"^Type .* expects a function or a callable class: ?", "", reason)
    reason = re.sub(r"\.? Got value: (Namespace|NestedArg)\(.*", "", reason)
    reason = re.sub(r"^Problem with given class_path '([\w.]+)':$", r"\1", reason)
    reason = re.sub(r"^Not of type \w+: invalid literal for int\(\) .*: '(.*)'", r"expected int, got \1", reason)
    reason = re.sub(r"^Not of type \w+: could not convert string to float: '(.*)'", r"expected float, got \1", reason)
    reason = re.sub(r"^Not of type \w+: ", "", reason)
    reason = re.sub(r"Expected a <class '([\w.]+)'>", r"expected \1", reason)
    reason = re.sub(
        r"Expected a dot import path string: (.*)", r"\1 is no class path such as package.module.Class", reason
    )
    return re.sub(r"\. Got value: (.*)", r", got \1", reason)


def _place(typed: str, command_line: Sequence[str]) -> str:
    """Return the configuration file and line of the first key of this name, or the file that is not YAML."""
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
