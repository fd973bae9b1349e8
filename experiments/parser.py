"""The parser of the command, whose errors are one line."""

import contextlib
import inspect
import sys
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_args, get_type_hints

import torch
import yaml
from jsonargparse import Namespace, dict_to_namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments import names
from experiments.class_paths import accept_moved_classes, import_class
from experiments.errors import causes, place_in_users_code
from experiments.explain import broken_file, flag_of, given, one_line, place
from experiments.yaml_files import walk
from lightning_modules.runtime.private_names import default_classes, option_names

# Without this, the help and the JSON schema list all tensor classes for `lr: float | Tensor`.
set_parsing_settings(subclasses_disabled=[torch.Tensor, type], instantiate_subclass_spec_in_any=False)
accept_moved_classes()
# A default of Lightning can be text of an enumeration, as `Timer(interval=...)`.
yaml.SafeDumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))


class ExperimentParser(LightningArgumentParser):
    """The parser of LightningCLI, with errors of one line and without abbreviations."""

    command_line: ClassVar[list[str]] = []  # for error messages
    typed: ClassVar[list[str]] = []  # the same as the user gave it, with the names of experiments
    folder: ClassVar[Path] = Path()  # in which the command was called

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # --trainer.max_epoch is an error, not --trainer.max_epochs
        super().__init__(*args, **kwargs)

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """Return the defaults; a class among them has only the arguments that were named.

        Otherwise its other arguments would be kept when the user names another class: the `eps` of AdamW for Adagrad.
        """
        defaults = super().get_defaults(*args, **kwargs)
        for name, default in default_classes(self).items():
            defaults[name] = dict_to_namespace(default)
        return defaults

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:
        """Parse; a configuration file that is not UTF-8, or has a number that is too long, is an error too."""
        try:
            return super().parse_args(*args, **kwargs)
        except ValueError as error:
            with contextlib.chdir(self.folder):
                broken = broken_file(self.command_line)
            if broken is None:
                raise
            self.error(broken, error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        options = option_names(getattr(ex, "subcommand_parser", None) or self)
        with contextlib.chdir(self.folder):  # jsonargparse works in the folder of the file that it reads
            line = one_line(message, options, self.command_line)
        if passed := next(filter(None, map(place_in_users_code, causes(ex))), None):  # a module that cannot be imported
            line += f" ({passed})"
        sys.stderr.write(f"error: {line}\n")
        raise SystemExit(2)


def check_nulls(config: Namespace) -> None:
    """Refuse arguments of classes that are set to null although their type has no null and they have a default.

    jsonargparse passes the null on. An empty value in YAML, `tokenizer:`, is null.

    Raises:
        MisconfigurationException: If there is such an argument.
    """
    for key, part in walk(config):
        if not isinstance(part, Namespace) or not isinstance(part.get("class_path"), str):
            continue
        for name, value in vars(part.get("init_args") or Namespace()).items():
            if value is None and not _takes_null(import_class(part["class_path"]), name):
                flag = flag_of(f"{key}.{name}", "", ExperimentParser.command_line)
                where = "--" if flag else place(name, ExperimentParser.command_line)
                raise MisconfigurationException(
                    f"{where}{key}.{name}: is null, which is no value of it; "
                    "give a value, or leave the key out for the default"
                )


def check_seed(seed: Any) -> None:
    """Refuse a seed of the data that is not that of the run, which would take its place without a word.

    Raises:
        MisconfigurationException: If a file or a flag gives one.
    """
    for where, content in given(ExperimentParser.command_line):
        of_file = content.get("seed_everything") if isinstance(content, dict) else None  # that a flag may replace
        for key, value in walk(content):
            flag = names.plain(key)
            if flag.removeprefix("--") == "data.seed" and value not in (seed, of_file):
                raise MisconfigurationException(
                    f"{where}{flag}: is {value}, and seed_everything, which is the seed of the data too, is {seed}; "
                    "set that one and leave this one out"
                )


def _takes_null(kind: type, name: str) -> bool:
    """Return whether an argument of a class has null as a value or default, or is unknown or without a type."""
    for base in kind.__mro__:
        constructor = vars(base).get("__init__", object.__init__)
        parameter = inspect.signature(constructor).parameters.get(name)
        if parameter is not None:
            try:
                hint = get_type_hints(constructor).get(name, Any)
            except (NameError, TypeError):  # names that are imported for type checkers only
                return True
            return parameter.default is None or hint is Any or type(None) in get_args(hint)
    return True
