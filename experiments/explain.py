"""The errors of jsonargparse in one line: where, what is wrong, and a similar name if there is one."""

import contextlib
import difflib
import importlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments import names, trust
from experiments.class_paths import import_class
from experiments.errors import UserError
from experiments.help import options as options_of
from experiments.yaml_files import load_yaml, read_yaml, walk
from lightning_modules.optim.schedules import takes_built_schedules

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
_IN_MODULE = re.compile(r"(?:No module named|module) '(\w+)")
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
_PROBLEM = r"Problem with given class_path '[\w.]+':"
_BESIDE = re.compile(r"Option '(class_path|\w+\.\w+)' is not accepted")  # a key beside `class_path` is no argument
_NO_VALUE = re.compile(r"argument (?:-\w/)?(--[\w.]+): expected one argument")
_GIVEN_VALUE = re.compile(r"Given value: ?(.*?)(?:\. Got value: Namespace\(.*)?$", re.MULTILINE)
_REPRESENTED = ("Namespace(", "NestedArg(", "[{", "{")  # values that would not be known again
_OUT_OF_RANGE = "does not conform to restriction"
_EXPECTED_LIST = re.compile(r"expected (?:list|tuple), got ([^{]+)$")
_BOOLEAN = re.compile(r"expected str, got (True|False)$")
_NO_SPACE = re.compile(r"(\w+):([^' ;/\\]+)(?:' is not accepted| is no class path)")
_LINKED = {"data.seed": "seed_everything"}  # arguments that the user gives by another name
_BASES = {
    "ExperimentModule": "lightning_modules.base.ExperimentModule, see experiments/guides/your_model.md",
    "ExperimentDataModule": "datamodules.base.ExperimentDataModule, see experiments/guides/your_data.md",
}
_NOT_INIT_ARGS = ("args", "arguments", "params", "kwargs")  # in place of `init_args`
_KEY = re.compile(r'Parser key "([^"]+)":')
# Lines of a message of jsonargparse that are not the reason: the types it tried, and the whole value.
_AROUND = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but|"
    r"Subclass types expect one of:|a class path \(str\)|a dict with|$)"
)


class _Name(NamedTuple):
    """The name that a message is about: a class, an option of a class, or an option of the command."""

    typed: str  # as the user has written it; of an option in a section that does not exist, the section
    similar: str | None = None  # what it probably means
    takes: str = ""  # what the class takes
    is_word: bool = False  # whether it is a word of the command line

    def hint(self) -> str:
        """Return the similar name, or else what the class takes, to follow what is wrong."""
        return f" (did you mean {self.similar!r}?)" if self.similar else self.takes


def one_line(message: str, options: Sequence[str], command_line: Sequence[str]) -> str:
    """Shorten a message of jsonargparse to one line: where, what is wrong, and a similar name if there is one.

    Args:
        message: The message, an indented tree of the types that were tried.
        options: Names of the options of the subcommand.
        command_line: The command line; its configuration files are searched for the wrong key.
    """
    if broken := broken_file(command_line):
        return broken
    if lacking := _flag_without_value(message, command_line):
        return f"{lacking}: needs a value"
    if _BESIDE.search(message) and (misplaced := _beside_class_path(command_line)):
        return misplaced
    keys = _nested_keys(message)
    for taken in keys:  # by the class that is meant; that another class does not take it does not matter
        message = re.sub(rf"- {_PROBLEM}\s+Option '{re.escape(taken)}' is not accepted", "", message)
    key = ".".join(keys)
    chosen = options_of.chosen(command_line[1:])
    name = _name(message, key, options, command_line, chosen)
    flag = flag_of(key, name.typed, command_line)
    what = _with_value(_what(message, key, chosen), message, flag, command_line)
    what = _with_advice(what, flag, command_line)
    if name.similar is None and (choices := _LITERAL.findall(message)) and (given := _GIVEN.search(what)):
        name = name._replace(similar=_closest(given[1], re.findall(r"'([^']*)'", "".join(choices))))
    if key in _LINKED:
        key = _LINKED[key]
        flag, name = flag_of(key, key, command_line), _Name(key)
        what = what.rpartition("; ")[2]
    where = "--" if flag and key else "" if flag or name.is_word else place(name.typed, command_line)
    return f"{where}{key + ': ' if key else ''}{what}{name.hint()}"


# --- what is wrong ----------------------------------------------------------------------------------------------------


def _what(message: str, key: str, chosen: Mapping[str, options_of.Chosen]) -> str:
    """Return what is wrong: the reasons of a message that matter, or one that is known better."""
    if denied := _DENIED.search(message):  # the other types that were tried do not matter
        what = trust.refusal(*denied.groups())
    elif on_path := _SETTING_OF_PATH.search(message):
        path, setting = on_path.groups()
        what = (
            f"{path} is a path, which has no setting {setting}: give a class that has it in its place, as "
            f"--{key} CLASS --{key}.{setting} VALUE"
        )
    else:
        what = "; ".join(dict.fromkeys(_reasons(message))) or "is not valid"
    schedule = chosen["lr_scheduler"].path.rpartition(".")[2]
    if key == "lr_scheduler" and (advice := takes_built_schedules(schedule)):
        what = advice  # these are arguments that a YAML cannot give
    if (module := _IN_MODULE.search(message)) and (hiding := _hides_a_file_of_the_user(module[1])):
        what += f"; {module[1]} is that of {hiding}, so your own code needs another name"
    return what


def _hides_a_file_of_the_user(name: str) -> str | None:
    """Return where a module or package comes from that hides one of the working folder, or `None` if none is hidden."""
    origin = getattr(sys.modules.get(name), "__file__", None)
    module, package = Path(f"{name}.py"), Path(name)
    if origin is None or not (module.is_file() or package.is_dir()):
        return None
    if Path(origin).resolve() in (module.resolve(), (package / "__init__.py").resolve()):
        return None
    return "llm-train" if Path(origin).parent.parent == names.SHIPPED.parent else origin


def _reasons(message: str) -> list[str]:
    """Return the reasons in a message, without those of types that the user did not mean."""
    reasons = [line.strip().removeprefix("- ") for line in _KEY.sub("", message).splitlines()]
    reasons = list(filter(None, (_plain(reason) for reason in reasons if not _AROUND.match(reason))))
    reasons = [reason for reason in reasons if not reason.startswith("Not a valid subclass of ")] or reasons[:1]
    # Of several types, those of which the class is no subclass do not matter.
    reasons = [reason for reason in reasons if " to be a subclass of " not in reason] or reasons[-1:]
    # Where a text or a list could be given in place of a class, what is wrong with the class matters.
    of_classes = [reason for reason in reasons if not _OTHER_FORM.match(reason)]
    if not all(map(_BARE_PATH.fullmatch, of_classes)):
        reasons = of_classes
    return _that_matter(reasons)


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


def _plain(reason: str) -> str:
    reason = re.sub(r"^Type .* expects a function or a callable class: ?", "", reason)
    reason = re.sub(r"\.? Got value: (Namespace|NestedArg)\(.*", "", reason)
    reason = re.sub(r"^Problem with given class_path '([\w.]+)':$", r"\1", reason)
    reason = re.sub(r"^Not of type \w+: invalid literal for int\(\) .*: '(.*)'", r"expected int, got \1", reason)
    reason = re.sub(r"^Not of type \w+: could not convert string to float: '(.*)'", r"expected float, got \1", reason)
    reason = re.sub(
        r"^Not of type \w+: (int|float)\(\) argument must be .*, not '(\w+)'", r"expected \1, got a \2", reason
    )
    reason = re.sub(r"^Not of type \w+: ", "", reason)
    reason = re.sub(r"Expected a <class '([\w.]+)'>", r"expected \1", reason)
    reason = re.sub(r"^expected collections\.abc\.(Sequence|Iterable)", "expected list", reason)
    reason = re.sub(r"Expected a dot import path string: ?(.*)", rf"\1 {_NO_PATH}", reason)
    reason = re.sub(r"^Import path (?:([\w.]+) )?does not correspond to a subclass of (\w+)", _no_subclass, reason)
    return re.sub(r"\. Got value: (.*)", r", got \1", reason)


def _no_subclass(found: re.Match[str]) -> str:
    path, base = found.groups()
    advice = f"; derive it from {_BASES[base]}" if base in _BASES else ""
    return f"{path or 'the class'} is no subclass of {base}{advice}"


def _with_value(what: str, message: str, flag: str | None, command_line: Sequence[str]) -> str:
    """Return what is wrong with the value that was given: the innermost of a message, or else that of the flag."""
    reason = what.rpartition("; ")[2]
    if reason.startswith(("expected ", _OUT_OF_RANGE)) and "got " not in reason:
        given = _GIVEN_VALUE.search(message)
        value = given[1] if given else _value_of(flag, command_line) if flag else None
        if value is not None and not value.startswith(_REPRESENTED):
            in_front = what.removesuffix(reason)
            what = f"{in_front}{value} {reason}" if reason.startswith(_OUT_OF_RANGE) else f"{what}, got {value}"
    return re.sub(r", got ?$", ", got nothing", what)


def _with_advice(what: str, flag: str | None, command_line: Sequence[str]) -> str:
    """Return what is wrong, with the way to write a list, or a text that YAML takes for something else."""
    if (expected := _EXPECTED_LIST.search(what)) and (flag or expected[1].startswith("[")):
        words = [expected[1], *(_words_after(flag, command_line) if flag else ())]
        items = [item.strip(" '\"") for word in words for item in word.strip("[]").split(",")]
        what += f": write '{json.dumps([_number(item) for item in items])}', in quotation marks"
    if _BOOLEAN.search(what):
        what += ", as YAML reads yes, no, on and off: write it in quotation marks"
    if lacks_space := _NO_SPACE.search(what):
        what += f": a space is missing, write '{lacks_space[1]}: {lacks_space[2]}', in quotation marks"
    return what


def _number(text: str) -> Any:
    """Return the number that a text is, or else the text."""
    with contextlib.suppress(yaml.YAMLError):
        value = load_yaml(text)
        return value if isinstance(value, int | float) else text
    return text


def _words_after(flag: str, command_line: Sequence[str]) -> list[str]:
    """Return the words that stand between a flag with its value and the next flag."""
    first = command_line.index(flag) + (1 if "=" in flag else 2)
    return [*itertools.takewhile(lambda word: not word.startswith("-"), command_line[first:])]


def _flag_without_value(message: str, command_line: Sequence[str]) -> str | None:
    """Return the flag that has no value, as it is written, if a message says that there is one."""
    if found := _NO_VALUE.search(message):
        for word, following in itertools.pairwise([*command_line, "-"]):
            if word.startswith(found[1]) and "=" not in word and following.startswith("-"):
                return word
    return None


def _value_of(word: str, command_line: Sequence[str]) -> str:
    """Return the value of a flag of the command line."""
    _, equals, value = word.partition("=")
    return value if equals else next((after for flag, after in itertools.pairwise(command_line) if flag == word), "")


# --- which name is similar --------------------------------------------------------------------------------------------


def _name(
    message: str,
    key: str,
    options: Sequence[str],
    command_line: Sequence[str],
    chosen: Mapping[str, options_of.Chosen],
) -> _Name:
    """Return the name that a message is about, with the one that is probably meant."""
    name = _Name(key.rsplit(".", 1)[-1])
    if unknown := _UNKNOWN_OPTION.search(message):
        word = next(filter(None, unknown.groups()))
        name = _Name(word.removeprefix("--"))
        is_word = any(given.partition("=")[0].removeprefix("--") == name.typed for given in command_line)
        around = _CLASS_PATH.findall(message[: unknown.start()])  # the last one is around the option
        name = _option_of_class(name.typed, key, around, chosen) or _option(word, options, chosen)
        name = name._replace(is_word=is_word)
    elif path := _GIVEN_PATH.search(message):
        given_path = next(filter(None, path.groups()))
        similar = _similar_class(given_path, key.removesuffix(".class_path"))
        name = name._replace(similar=None if similar == given_path else similar)
    if name.similar is None and (missing := _NO_ATTRIBUTE.search(message)):
        module, attribute = missing.groups()
        name = name._replace(typed=attribute, similar=_closest(attribute, dir(importlib.import_module(module))))
    return name


def _option_of_class(
    typed: str, key: str, around: Sequence[str], chosen: Mapping[str, options_of.Chosen]
) -> _Name | None:
    """Return a name that is an option of a class, or `None`."""
    if around:
        return _Name(typed, _closest(typed, inspect.signature(import_class(around[-1])).parameters), _takes(around[-1]))
    if key not in chosen:
        return None
    path = chosen[key].path
    if "." not in path:
        path = _similar_class(path, key) or path
    return _Name(typed, _closest(typed, options_of.arguments(path)), _takes(path))


def _option(word: str, options: Sequence[str], chosen: Mapping[str, options_of.Chosen]) -> _Name:
    """Return a name that is an option of the command."""
    typed = word.removeprefix("--")
    section = typed.split(".")[0]
    is_known = section in {option.split(".")[0] for option in options}
    return _Name(typed if is_known else section, _similar_option(word, options, chosen))


def _takes(path: str) -> str:
    """Return the arguments that a class takes, for a message."""
    found = [*options_of.arguments(path)]
    return f" ({path.rpartition('.')[2]} takes {', '.join(found)})" if found else ""


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


# --- where it stands --------------------------------------------------------------------------------------------------


def given(command_line: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield what a command line sets: the content of each file, after its name for a message, and each flag alone."""
    for file in trust.files(command_line):
        yield f"{file}: ", read_yaml(file)
    for flag, value in names.flags(command_line):
        with contextlib.suppress(yaml.YAMLError):
            yield "", {flag: load_yaml(value)}


def _beside_class_path(command_line: Sequence[str]) -> str | None:
    """Return the error of arguments of a class that are beside its `class_path` in a file or a flag, if there are."""
    for where, content in given(command_line):
        for key, names_beside in _misplaced(content):
            if where:
                where = place(names_beside[0], command_line) or where
            for name in names_beside:
                if name in _NOT_INIT_ARGS or _closest(name, ["init_args"]):
                    return (
                        f"{where}{key.replace('+', '')}: {name} is no key beside class_path (did you mean 'init_args'?)"
                    )
            verb = "belongs" if len(names_beside) == 1 else "belong"
            return f"{where}{key}: {', '.join(names_beside)} {verb} under init_args, below class_path"
    return None


def _misplaced(content: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield the keys of classes in a configuration that have arguments outside of `init_args`, with their names."""
    for key, part in walk(content):
        if not isinstance(part, dict) or "class_path" not in part:
            continue
        if beside := [name for name in part if name not in ("class_path", "init_args", "dict_kwargs")]:
            yield key, beside


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


def flag_of(key: str, typed: str, command_line: Sequence[str]) -> str | None:
    """Return the flag that sets a key, or, if the message has none, the flag with the misspelt name."""
    for word in command_line:
        flag = names.plain(word.partition("=")[0].removeprefix("--").rstrip("+"))
        if not word.startswith("--") or flag == "config":
            continue
        if key and (flag == key or key.startswith(f"{flag}.") or (typed and flag.startswith(f"{key}.{typed}"))):
            return word
        if not key and typed and f".{flag}".endswith(f".{typed}"):
            return word
    return None


def place(typed: str, command_line: Sequence[str]) -> str:
    """Return the configuration file and line of the first key of this name, or an empty text."""
    key = re.compile(rf"\b{re.escape(typed.rsplit('.', 1)[-1])}\+?:")
    for file in reversed(trust.files(command_line)) if typed else ():  # the last one counts
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
            if key.search(line.split("#")[0]):
                return f"{file}, line {number}: "
    return ""


def broken_file(command_line: Sequence[str]) -> str | None:
    """Return what is wrong with the first configuration file that is not a mapping in YAML."""
    for file in trust.files(command_line):
        try:
            if not isinstance(read_yaml(file), dict | None):
                return f"{file}: holds no settings, such as `trainer: {{max_steps: 100}}`"
        except UserError as error:
            return str(error)
    return None
