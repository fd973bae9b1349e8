"""The options of fit, validate, test and predict, read from source text: for their help and for completion.

A test compares them with those of the parser, whose import takes seconds.
"""

import ast
import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import names
from experiments.errors import UserError
from experiments.help import index
from experiments.help.index import Parameter
from experiments.yaml_files import load_yaml, read_yaml

COMMANDS = ("fit", "validate", "test", "predict")
DEFAULTS = names.SHIPPED / "trainer" / "defaults.yaml"
_TRAINER = "lightning.pytorch.Trainer"
# In place of Lightning's texts, for what differs here.
_TEXTS = {
    "ckpt_path": "Checkpoint to continue or to evaluate: `last`, `best`, or a file. `fit` goes on from the last one in "
    "the folder of its run, and from another in a folder of its own.",
    "weights_only": "Has no effect: a checkpoint never runs code.",
    "verbose": "Has no effect: the last lines of a run have the results.",
    "return_predictions": "Has no effect.",
}
_NOT_OPTIONS = ("model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders")
_FROM_MODULE = ("params", "optimizer", "total_steps", "vocab_size", "pad_token_id", "classes", "seed")


@dataclass
class Chosen:
    """A class that a command line chooses for a section, and the arguments that its files set."""

    path: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


def own(command: str) -> dict[str, Parameter]:
    """Return the options of a command that are not of a section, by name."""
    found = {
        "config": Parameter("config", "NAME", help="Experiment, preset or file with settings; any number of them. "
                            "`llm-train list experiments` lists those that come with the project."),
        "print_config": Parameter("print_config", help="Print the settings of all files and flags together, and exit."),
        "seed_everything": Parameter("seed_everything", "int", "0", "Seed of the data, the weights and the training."),
    }  # fmt: skip
    for parameter in index.function(f"{_TRAINER}.{command}"):
        if parameter.name not in _NOT_OPTIONS:
            text = _TEXTS.get(parameter.name, parameter.help)
            found[parameter.name] = Parameter(parameter.name, parameter.type, parameter.default, text)
    return found | {name: p for name, p in _added(command).items() if name not in ("optimizer", "lr_scheduler")}


@functools.cache
def _added(command: str) -> dict[str, Parameter]:
    """Return the options that `add_arguments_to_parser` of `experiments.cli.ExperimentCLI` adds."""
    nodes = ast.walk(ast.parse(index.source("experiments.cli")))
    method = next(node for node in nodes if getattr(node, "name", "") == "add_arguments_to_parser")
    found = {}
    of_others = {  # of one command alone
        id(call)
        for branch in ast.walk(method)
        if isinstance(branch, ast.If) and f"llm-train {command}" not in ast.unparse(branch.test)
        for call in ast.walk(branch)
    }
    for call in ast.walk(method):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "parser.add_argument" and id(call) not in of_others:
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            name = ast.literal_eval(call.args[0]).removeprefix("--")
            kind_of_value = ast.unparse(given["type"]) if "type" in given else "bool"
            default = ast.unparse(given["default"]) if "default" in given else "None"
            found[name] = Parameter(name, kind_of_value, default, ast.literal_eval(given["help"]))
    return found


@functools.cache
def section(name: str) -> dict[str, Parameter]:
    """Return the options of the sections `run` and `trainer`, by name."""
    kind = index.find({"run": "experiments.run.run_folder.RunArguments", "trainer": _TRAINER}[name])
    found = dict(index.parameters(kind)) if kind else {}
    if name == "trainer":
        for key, value in read_yaml(DEFAULTS)["trainer"].items():
            shown = [item["class_path"].rpartition(".")[2] for item in value] if isinstance(value, list) else value
            found[key] = Parameter(key, found[key].type, str(shown), found[key].help)
    return found


# The documentation of PyTorch's schedules speaks of epochs.
STEPS_OF_SCHEDULES = "A schedule advances at every optimiser step, also where its text says epoch."
SECTIONS = ("model", "data", "optimizer", "lr_scheduler")  # that name a class


_CLASSES: dict[str, tuple[str, ...]] = {  # the base of the classes that a flag takes, and the packages that have some
    "model": ("lightning_modules.base.ExperimentModule", "lightning_modules.{topic}"),
    "data": ("datamodules.base.ExperimentDataModule", "datamodules"),
    "optimizer": ("torch.optim.Optimizer", "lightning_modules.optim", "torch.optim"),
    "lr_scheduler": (
        "torch.optim.lr_scheduler.LRScheduler", "lightning_modules.optim.schedules", "torch.optim.lr_scheduler"
    ),
    "trainer.callbacks": (
        "lightning.pytorch.callbacks.Callback", "lightning_modules", "lightning.pytorch.callbacks"
    ),
    "trainer.logger": (
        "lightning.pytorch.loggers.Logger", "lightning_modules.runtime.loggers", "lightning.pytorch.loggers"
    ),
}  # fmt: skip
# Those that a run refuses, see `lightning_modules.optim.unusable`, and one that the project has for all parameters.
_NOT_LISTED = ("torch.optim.LBFGS", "torch.optim.SparseAdam", "torch.optim.Muon")


def classes(flag: str, start: str = "") -> list[index.Class]:
    """Return the classes that a flag takes, such as `model` or `trainer.callbacks`.

    Args:
        flag: Name of the flag, without hyphens.
        start: Beginning of their paths; packages that cannot have such classes are not read.
    """
    if flag.endswith("source"):
        bases = [kind for kind in index.classes("datamodules") if kind.name.endswith("Source") and not kind.is_public]
        specs: list[tuple[str, ...]] = [(base.defined, "datamodules") for base in bases]
    else:
        specs = [_CLASSES[flag]] if flag in _CLASSES else []
    found: set[index.Class] = set()
    for base, *packages in specs:
        places = [*index.packages_of_user(), *itertools.chain(*map(_of_topics, packages))]
        read = [place for place in places if f"{place}.".startswith(start) or start.startswith(f"{place}.")]
        found.update(index.subclasses(base, *read))
    return sorted((kind for kind in found if kind.path not in _NOT_LISTED), key=lambda kind: kind.path)


def _of_topics(package: str) -> list[str]:
    return [package.format(topic=topic) for topic in index.topics()] if "{topic}" in package else [package]


def arguments(path: str) -> dict[str, Parameter]:
    """Return the arguments of a class that a user can set; others are linked from the data, or given by the module."""
    kind = index.find(path)
    found = index.parameters(kind) if kind else {}
    return {name: parameter for name, parameter in found.items() if name not in _FROM_MODULE}


def chosen(args: Sequence[str]) -> dict[str, Chosen]:
    """Return the classes that the files and flags of a command line choose for the sections that name one."""
    found = {name: Chosen() for name in SECTIONS}
    for flag, value in names.flags(args):
        if flag in names.FILE_FLAGS:
            file = names.find(value)
            for name, content in _content(file).items() if file else ():
                if name in found:
                    _choose(found[name], content)
        elif flag.removeprefix("--") in found:
            _choose(found[flag.removeprefix("--")], value)
    return found


def _choose(section: Chosen, content: Any) -> None:
    path = content if isinstance(content, str) else None
    given = content if isinstance(content, dict) else {}
    path = given.get("class_path", path)
    if isinstance(path, str) and path != section.path:
        section.path, section.arguments = path, {}
    if isinstance(given.get("init_args"), dict):
        section.arguments |= given["init_args"]


def _content(file: Path) -> dict[str, Any]:
    try:
        content = read_yaml(file)
    except (UserError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def values(parameter: Parameter) -> list[str]:
    """Return the values of an option, if there are few."""
    if "bool" in re.findall(r"\w+", parameter.type):
        return ["true", "false"]
    literals = re.findall(r"Literal\[(.*?)\]", parameter.type)
    return [str(value) for text in literals for value in load_yaml(f"[{text}]")]


def written(value: str | None) -> str | None:
    """Return a default as YAML has it."""
    known = {"None": "null", "True": "true", "False": "false"}
    if value is None:
        return None
    return known.get(value, value[1:-1] if re.fullmatch(r"'[^']*'", value) else value)
