"""A parser whose errors are one line: where, what is wrong, and a similar name if there is one."""

import contextlib
import difflib
import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_args, get_type_hints

import torch
import yaml
from jsonargparse import Namespace, dict_to_namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments import names, trust
from experiments.class_paths import accept_moved_classes, import_class
from experiments.errors import UserError, causes, place_in_users_code
from experiments.help import options as options_of
from experiments.yaml_files import load_yaml, read_yaml
from lightning_modules.optim.schedules import takes_built_schedules
from lightning_modules.runtime.private_names import default_classes, option_names

# Without this, the help and the JSON schema list all tensor classes for `lr: float | Tensor`.
set_parsing_settings(subclasses_disabled=[torch.Tensor, type], instantiate_subclass_spec_in_any=False)
accept_moved_classes()
# A default of Lightning can be text of an enumeration, as `Timer(interval=...)`.
yaml.SafeDumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))

# What Transformers, nanoGPT and others call an option.
_OF_OTHER_PROGRAMS = {
    "bf16": "trainer.precision",
    "device": "trainer.accelerator",
    "dtype": "trainer.precision",
    "epochs": "trainer.max_epochs",
    "eval_steps": "trainer.val_check_interval",
    "fp16": "trainer.precision",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "learning_rate": "optimizer.lr",
    "log_interval": "trainer.log_every_n_steps",
    "logging_steps": "trainer.log_every_n_steps",
    "max_grad_norm": "trainer.gradient_clip_val",
    "num_train_epochs": "trainer.max_epochs",
    "out_dir": "run.root",
    "output_dir": "run.root",
    "per_device_train_batch_size": "data.batch_size",
    "resume_from_checkpoint": "ckpt_path",
    "seed": "seed_everything",
}
_UNKNOWN_OPTION = re.compile(r"(?:does not accept option|Option) '([\w.]+)'|unrecognized arguments: ([^\s=]+)")
_GIVEN_PATH = re.compile(r"class_path '([\w.]+)'|dot import path string: ([\w.]+)")
_HIDDEN = re.compile(r"(?:No module named|module) '(experiments|lightning_modules|datamodules)\b")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_GIVEN = re.compile(r", got (.*)$")
_BARE_PATH = re.compile(r"[\w.]+")
_NO_PATH = "is no class path such as package.module.Class"
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_CLASS_PATH = re.compile(r"class_path[ =]'([\w.]+)'")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)' entry ")
_SETTING_OF_PATH = re.compile(
    r"class_path '([^']+\.[^A-Z'][^.']*)':\s+(?:No module named|module ').*?NestedArg\(key='(\w+)'", re.DOTALL
)
_OTHER_FORM = re.compile(r"expected (str|list|str, bytes or os\.PathLike object, not \w+)(, got |$)")
_KEY = re.compile(r'Parser key "([^"]+)":')
# Lines of a message of jsonargparse that are not the reason: the types it tried, and the whole value.
_AROUND = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but|"
    r"Subclass types expect one of:|a class path \(str\)|a dict with|$)"
)


class ExperimentParser(LightningArgumentParser):
    """The parser of LightningCLI, with errors of one line and without abbreviations."""

    command_line: ClassVar[list[str]] = []  # for error messages
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
                broken = _broken_file(self.command_line)
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
        if place := next(filter(None, map(place_in_users_code, causes(ex))), None):  # a module that cannot be imported
            line += f" ({place})"
        sys.stderr.write(f"error: {line}\n")
        raise SystemExit(2)


def one_line(message: str, options: Sequence[str], command_line: Sequence[str]) -> str:
    """Shorten a message of jsonargparse to one line: where, what is wrong, and a similar name if there is one.

    Args:
        message: The message, an indented tree of the types that were tried.
        options: Names of the options of the subcommand.
        command_line: The command line; its configuration files are searched for the wrong key.
    """
    if broken := _broken_file(command_line):
        return broken
    if "Option 'class_path' is not accepted" in message and (misplaced := _beside_class_path(command_line)):
        return misplaced
    key = ".".join(_nested_keys(message))
    reasons = [line.strip().removeprefix("- ") for line in _KEY.sub("", message).splitlines()]
    reasons = [_plain(reason) for reason in reasons if not _AROUND.match(reason)]
    reasons = [reason for reason in reasons if not reason.startswith("Not a valid subclass of ")] or reasons[:1]
    # Of several types, those of which the class is no subclass do not matter.
    reasons = [reason for reason in reasons if " to be a subclass of " not in reason] or reasons[-1:]
    # Where a text or a list could be given in place of a class, what is wrong with the class matters.
    reasons = [reason for reason in reasons if not _OTHER_FORM.match(reason)] or reasons
    what = "; ".join(dict.fromkeys(_that_matter(list(filter(None, reasons))))) or "is not valid"
    if denied := _DENIED.search(message):  # the other types that were tried do not matter
        what = trust.refusal(*denied.groups())
    if on_path := _SETTING_OF_PATH.search(message):
        what = (
            f"{on_path[1]} is a path, which has no setting {on_path[2]}: give a class that has it in its place, as "
            f"--{key} CLASS --{key}.{on_path[2]} VALUE"
        )
    chosen = options_of.chosen(command_line[1:])
    schedule = chosen["lr_scheduler"].path
    if key == "lr_scheduler" and (advice := takes_built_schedules(schedule.rpartition(".")[2])):
        what = advice  # these are arguments that a YAML cannot give
    if (hidden := _HIDDEN.search(message)) and Path(hidden[1]).resolve() != names.SHIPPED.parent / hidden[1]:
        what += f"; {hidden[1]} is the package of llm-train, so your own code needs a package of another name"

    # The name that is probably misspelt: a class, an option of a class, or an option of the command.
    typed = key.rsplit(".", 1)[-1]
    takes = ""  # what the class takes, if no name is similar
    similar, is_word = None, False  # whether the name is a word of the command line
    if unknown := _UNKNOWN_OPTION.search(message):
        word = next(filter(None, unknown.groups()))
        typed = word.removeprefix("--")
        is_word = any(given.partition("=")[0].removeprefix("--") == typed for given in command_line)
        if class_paths := _CLASS_PATH.findall(message[: unknown.start()]):  # the last one is around the option
            similar = _closest(typed, inspect.signature(import_class(class_paths[-1])).parameters)
            takes = _takes(class_paths[-1])
        elif key in chosen:
            path_of_class = chosen[key].path
            if "." not in path_of_class:
                path_of_class = _similar_class(path_of_class, key) or path_of_class
            similar = _closest(typed, options_of.arguments(path_of_class))
            takes = _takes(path_of_class)
        else:
            similar = _similar_option(word, options, chosen)
            section = typed.split(".")[0]
            typed = typed if section in {option.split(".")[0] for option in options} else section
    elif path := _GIVEN_PATH.search(message):
        given_path = next(filter(None, path.groups()))
        similar = _similar_class(given_path, key.removesuffix(".class_path"))
        similar = None if similar == given_path else similar
    if (missing := _NO_ATTRIBUTE.search(message)) and similar is None:
        typed = missing[2]
        similar = _closest(typed, dir(importlib.import_module(missing[1])))
    flag = _flag_of(key, typed, command_line)
    if flag and what.startswith("expected ") and "got " not in what:
        what += f", got {_value_of(flag, command_line)}"
    if similar is None and (choices := _LITERAL.findall(message)) and (given := _GIVEN.search(what)):
        similar = _closest(given[1], re.findall(r"'([^']*)'", "".join(choices)))
    hint = f" (did you mean {similar!r}?)" if similar else takes
    where = "--" if flag and key else "" if flag or is_word else _place(typed, command_line)
    return f"{where}{key + ': ' if key else ''}{what}{hint}"


def _that_matter(reasons: Sequence[str]) -> list[str]:
    """Return the reasons without those of types that the user did not mean, and with the values of all in one."""
    if choosing := [reason for reason in reasons if _LITERAL.search(reason)]:
        choices = [value for reason in choosing for text in _LITERAL.findall(reason) for value in text.split(", ")]
        given = _GIVEN.search(choosing[0])
        others = [reason for reason in reasons if reason not in choosing and not reason.startswith("expected ")]
        reasons = [*others, f"expected one of {', '.join(dict.fromkeys(choices))}{given[0] if given else ''}"]
    if any(reason.startswith("expected ") for reason in reasons):
        reasons = [reason for reason in reasons if not reason.endswith(_NO_PATH)]
    first = next((i for i, reason in enumerate(reasons) if not _BARE_PATH.fullmatch(reason)), 0)
    return [reason for i, reason in enumerate(reasons) if i <= first or not _BARE_PATH.fullmatch(reason)]


def _takes(path: str) -> str:
    """Return the arguments that a class takes, for a message."""
    found = [*options_of.arguments(path)]
    return f" ({path.rpartition('.')[2]} takes {', '.join(found)})" if found else ""


def _beside_class_path(command_line: Sequence[str]) -> str | None:
    """Return the error of arguments of a class that are beside its `class_path` in a file or a flag, if there are."""
    given: list[tuple[str, Any]] = [(f"{file}: ", read_yaml(file)) for file in trust.files(command_line)]
    for flag, value in names.flags(command_line):
        with contextlib.suppress(yaml.YAMLError):
            given.append(("", {flag: load_yaml(value)}))
    for where, content in given:
        for key, names_beside in _misplaced(content, ""):
            if where:
                where = _place(names_beside[0], command_line) or where
            verb = "belongs" if len(names_beside) == 1 else "belong"
            return f"{where}{key}: {', '.join(names_beside)} {verb} under init_args, below class_path"
    return None


def _misplaced(content: Any, key: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the keys of classes in a configuration that have arguments outside of `init_args`, with their names."""
    if isinstance(content, dict):
        beside = [name for name in content if name not in ("class_path", "init_args", "dict_kwargs")]
        if "class_path" in content and beside:
            yield key, beside
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, part in parts:
        yield from _misplaced(part, f"{key}.{name}".removeprefix("."))


def _closest(typed: str, candidates: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(typed.replace("-", "_"), list(candidates), n=1)), None)


def _similar_option(typed: str, known: Sequence[str], chosen: Mapping[str, options_of.Chosen]) -> str | None:
    """Return the option that an unknown word of the command line, or key of a file, probably means."""
    if typed.endswith((".yaml", ".yml")) or (not typed.startswith("-") and names.find(typed)):
        return f"-c {typed}"
    name = typed.lstrip("-").replace("-", "_")
    sections = {option.split(".")[0] for option in known}
    section, dot, _ = name.partition(".")
    if dot and section not in sections and (close := _closest(section, sections)):
        return close
    arguments = (f"{key}.{argument}" for key, kind in chosen.items() for argument in options_of.arguments(kind.path))
    candidates = [option for option in (*known, *arguments) if not option.endswith(".help")]
    ending = name.rsplit(".", 1)[-1]
    same = [option for option in candidates if option == name or option.rsplit(".", 1)[-1] == ending]
    by_ending = {option.rsplit(".", 1)[-1]: option for option in candidates}
    close = _closest(name, candidates) or by_ending.get(_closest(ending, by_ending) or "")
    if (meant := _OF_OTHER_PROGRAMS.get(name)) in candidates:
        close = meant
    found = min(same, key=lambda option: not option.startswith(section), default=close)
    # The words are right, and the hyphens are not.
    return f"--{found}" if found == name else found


def _similar_class(path: str, key: str) -> str | None:
    """Return the path of the class that a path, or a name alone, probably means as the value of a key."""
    kinds = {kind.name: kind.path for kind in options_of.classes(re.sub(r"\.\d+$", "", key))}
    name = path.rsplit(".", 1)[-1]
    return kinds.get(name) or kinds.get(_closest(name, kinds) or "")


def _value_of(word: str, command_line: Sequence[str]) -> str:
    """Return the value of a flag of the command line."""
    _, equals, value = word.partition("=")
    return value if equals else next((after for flag, after in itertools.pairwise(command_line) if flag == word), "")


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
    reason = re.sub(r"Expected a dot import path string: (.*)", rf"\1 {_NO_PATH}", reason)
    return re.sub(r"\. Got value: (.*)", r", got \1", reason)


def _place(typed: str, command_line: Sequence[str]) -> str:
    """Return the configuration file and line of the first key of this name, or an empty text."""
    key = re.compile(rf"\b{re.escape(typed.rsplit('.', 1)[-1])}\+?:")
    for file in reversed(trust.files(command_line)) if typed else ():  # the last one counts
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
            if key.search(line.split("#")[0]):
                return f"{file}, line {number}: "
    return ""


def _broken_file(command_line: Sequence[str]) -> str | None:
    """Return what is wrong with the first configuration file that is not a mapping in YAML."""
    for file in trust.files(command_line):
        try:
            if not isinstance(read_yaml(file), dict | None):
                return f"{file}: holds no settings, such as `trainer: {{max_steps: 100}}`"
        except UserError as error:
            return str(error)
    return None


def check_nulls(config: Any, key: str = "") -> None:
    """Refuse arguments of classes that are set to null although their type has no null and they have a default.

    jsonargparse passes the null on. An empty value in YAML, `tokenizer:`, is null.

    Raises:
        MisconfigurationException: If there is such an argument.
    """
    if isinstance(config, list):
        for number, item in enumerate(config):
            check_nulls(item, f"{key}.{number}")
    if not isinstance(config, Namespace | dict):
        return
    config = dict(vars(config) if isinstance(config, Namespace) else config)
    if isinstance(config.get("class_path"), str) and config.get("init_args"):
        arguments = config["init_args"]
        nulls = [name for name, value in dict(vars(arguments)).items() if value is None]
        for name in nulls:
            if not _takes_null(import_class(config["class_path"]), name):
                flag = _flag_of(f"{key}.{name}", "", ExperimentParser.command_line)
                where = "--" if flag else _place(name, ExperimentParser.command_line)
                raise MisconfigurationException(
                    f"{where}{key}.{name}: is null, which is no value of it; "
                    "give a value, or leave the key out for the default"
                )
    for name, value in config.items():
        check_nulls(value, key if name == "init_args" else f"{key}.{name}".removeprefix("."))


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
