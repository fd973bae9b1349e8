"""Which classes a configuration may name.

What the user names is trusted: a flag, and a YAML that is not in a run folder. A run folder can be a stranger's, and to
import a class is to run the code of its file. So the `config.yaml` of a run folder may name classes of this project,
and those of PyTorch and Lightning that neither run commands nor write where they are told; other packages need the
user's word: `--allow PACKAGE`, or an installed package with an entry point in the group `llm_train.classes`. A file
with the name of a run's configuration, such as `config.yaml`, counts as one wherever it is: it may have been copied.
"""

import contextlib
import importlib
import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments import names
from experiments.errors import UserError
from experiments.run import run_folder
from experiments.yaml_files import load_yaml, read_yaml, texts_in, walk
from lightning_modules.common import run_files
from lightning_modules.runtime.private_names import NEVER_IMPORTED, restricted_imports

ENTRY_POINTS = "llm_train.classes"
# The longest entry that a class path begins with decides.
_KNOWN = {
    "lightning_modules": True,
    "datamodules": True,
    "torch.optim": True,
    "transformers.Adafactor": True,
    "transformers.optimization": True,
    "lightning.pytorch.accelerators": True,
    "lightning.pytorch.callbacks": True,
    "lightning.pytorch.callbacks.LambdaCallback": False,  # calls any function
    "lightning.pytorch.callbacks.lambda_function": False,
    "lightning.pytorch.loggers.CSVLogger": True,
    "lightning.pytorch.loggers.csv_logs": True,
    "lightning.pytorch.loggers.TensorBoardLogger": True,
    "lightning.pytorch.loggers.tensorboard": True,
    "lightning.pytorch.plugins.precision": True,
    "lightning.pytorch.profilers": True,
    "lightning.pytorch.strategies": True,
    "lightning.pytorch.strategies.DeepSpeedStrategy": False,  # unpickles its checkpoints
    "lightning.pytorch.strategies.deepspeed": False,
}
_LIBRARIES = ("torch", "lightning", "transformers", "torchmetrics")  # allowed class by class, and not as a whole
_CONFIG = re.compile(r"config(_validate|_test|_predict)?\.yaml")  # the names that runs write
_CLASS_PATH = re.compile(r"([A-Za-z_]\w*\.)+[A-Za-z_]\w*")
_NOT_CLASSES = ("--allow", "--ckpt_path", "--run.")  # flags whose values are no classes
# Arguments of classes that say where to write.
_PLACES = ("cache_dir", "dirpath", "filename", "log_dir", "name", "root", "root_dir", "save_dir", "sub_dir", "version")
# Keys that a run does not record, because they are for one session.
SESSION_KEYS = ("allow", "auto_resume", "ckpt_path", "config", "return_predictions", "verbose", "weights_only")

_verdicts: dict[str, bool] = {}  # of the command that is running


def run_folder_of(config: Path) -> Path | None:
    """Return the run folder that a configuration lies in at any depth, or `None`.

    The folder of a file with the name of a run's configuration is a run folder, also without other files of a run.
    """
    config = config.resolve()
    for folder in config.parents:
        if run_folder.is_run(folder):
            return folder
    return config.parent if _CONFIG.fullmatch(config.name) else None


@contextlib.contextmanager
def trusted(args: Sequence[str]) -> Iterator[list[str]]:
    """Set which classes can be imported by name in the block, from a command line; yield what the user names in it.

    That is the class paths of its flags and files, and the packages of `--allow`.

    Raises:
        MisconfigurationException: If `--allow` names no package, or the configuration of a run folder would choose a
            checkpoint.
    """
    recorded = _recorded(args)
    named = [text for given in _by_user(args) for text in texts_in(given) if _CLASS_PATH.fullmatch(text)]
    packages = allowed(args)
    for file in recorded:
        _check_keys(file)
    global _verdicts
    before = _verdicts
    _verdicts = _verdicts_on(packages, named if recorded else None)
    try:
        with restricted_imports(_verdicts):
            yield [*named, *packages]
    finally:
        _verdicts = before


def _recorded(args: Sequence[str]) -> list[Path]:
    """Return the configuration files of a command line that are those of runs."""
    return [file for file in files(args) if run_folder_of(file)]


def _by_user(args: Sequence[str]) -> Iterator[Any]:
    """Yield what the user sets by the flags of a command line and by its files but those of runs."""
    for flag, value in _flags(args):
        if flag not in names.FILE_FLAGS and not flag.startswith(_NOT_CLASSES):
            with contextlib.suppress(yaml.YAMLError):
                yield load_yaml(value)
    yield from (_content(file) for file in files(args) if not run_folder_of(file))


def files(args: Sequence[str]) -> list[Path]:
    """Return the configuration files of a command line, in its order."""
    given = (Path(value) for flag, value in _flags(args) if flag in names.FILE_FLAGS)
    return [file for file in given if file.is_file()]


def of_run(packages: Sequence[str]) -> Mapping[str, bool]:
    """Return the verdicts on the classes that a run folder may name, beside those of these packages; see `check`."""
    return _verdicts_on(packages, [])


def allowed(args: Sequence[str]) -> list[str]:
    """Return the packages that a command line allows by `--allow`."""
    return [name.strip() for flag, value in _flags(args) if flag == "--allow" for name in value.strip("[]").split(",")]


def _verdicts_on(packages: Sequence[str], named: Sequence[str] | None) -> dict[str, bool]:
    """Return the verdicts; `named` are further class paths to allow, and `None` allows all but the dangerous ones."""
    for package in packages:
        if not all(part.isidentifier() for part in package.split(".")):
            raise MisconfigurationException(f"--allow {package}: is not the name of a package, such as my_package")
    verdicts = dict.fromkeys(packages, True)
    if named is not None:
        verdicts |= {"*": False} | _KNOWN
        verdicts |= dict.fromkeys((unit(path) for path in named if _denies(verdicts, path)), True)
        verdicts |= {point.value: True for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
        verdicts |= dict.fromkeys(packages, True)
        verdicts |= {where: True for path, allows in [*verdicts.items()] if allows for where in _defined_in(path)}
    return verdicts | dict.fromkeys(NEVER_IMPORTED, False)


def unit(class_path: str) -> str:
    """Return what to allow for a class: its package, or the class alone if it is of a library."""
    package = class_path.split(".")[0]
    return class_path if package in _LIBRARIES else package


def _defined_in(path: str) -> Iterator[str]:
    """Yield where a class of a library that the user allows is defined, which can differ from its path."""
    module, _, name = path.rpartition(".")
    if path not in _KNOWN and path.split(".")[0] in _LIBRARIES and module:
        with contextlib.suppress(ImportError, AttributeError):
            found = getattr(importlib.import_module(module), name)
            yield f"{found.__module__}.{found.__qualname__}"


def unknown_packages(config: Any) -> list[str]:
    """Return what `--allow` must name before this configuration can be read from a run folder."""
    parts = (part for _, part in walk(config) if isinstance(part, dict))
    paths = [path for part in parts if isinstance(path := part.get("class_path"), str)]
    return sorted({unit(path) for path in paths if _denies({"*": False} | _KNOWN, path)})


def check(class_path: str, verdicts: Mapping[str, bool] | None = None) -> None:
    """Raise a `MisconfigurationException` if a class may not be imported by this name.

    Args:
        class_path: Name of the class.
        verdicts: Result of `of_run`; `None` means those of the block of `trusted` that is running.
    """
    if (entry := _denies(_verdicts if verdicts is None else verdicts, class_path)) is not None:
        raise MisconfigurationException(refusal(class_path, entry))


def refusal(class_path: str, entry: str) -> str:
    """Return the message for a class that is denied by an entry of the verdicts."""
    if entry in NEVER_IMPORTED:
        return f"{class_path} is not imported: it can run commands or write files"
    return (
        f"{class_path} is not imported, because a run folder names it, or a file called {run_files.CONFIG} as in one, "
        "and it is not a class that this project knows; rename a file of your own, or if you trust its code, add "
        f"--allow {unit(class_path)}"
    )


def _denies(verdicts: Mapping[str, bool], path: str) -> str | None:
    """Return the entry that denies an import path, or `None`; the longest entry decides."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        entry = ".".join(parts[:length])
        if entry in verdicts:
            return None if verdicts[entry] else entry
    return "*" if "*" in verdicts else None


def _flags(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the flags of a command line with their values; `--KEY+` is `--KEY`."""
    return ((flag.rstrip("+"), value) for flag, value in names.flags(args))


def _content(file: Path) -> Any:
    """Return the content of a YAML file, or `None` if it is not YAML: the parser says so."""
    try:
        return read_yaml(file)
    except UserError:
        return None


def _check_keys(file: Path) -> None:
    """Check that the configuration of a run sets nothing that is for one session, such as a checkpoint."""
    content = _content(file)
    for key in SESSION_KEYS:
        if isinstance(content, dict) and content.get(key) is not None:
            raise MisconfigurationException(f"{file}: {key} is not a setting of a run; remove it, or give it as a flag")


def check_places(arguments: Namespace, args: Sequence[str]) -> None:
    """Check that the configuration of a run folder does not choose a place outside of the working folder to write to.

    Args:
        arguments: The arguments that the command line is parsed to. They hold also what is in the files that a
            configuration names in place of a section or class.
        args: The command line. What the user sets in it may be anywhere.

    Raises:
        MisconfigurationException: If there is such a place.
    """
    recorded = _recorded(args)
    if not recorded:
        return
    by_user = {place for given in _by_user(args) for place in _places(given)}
    by_user |= {(flag.rsplit(".", 1)[-1], Path(value)) for flag, value in _flags(args)}
    run = arguments["run"]
    run_path = Path(run.root, *filter(None, (run.topic, run.study, run.name))).resolve()
    if any(run_path == file.parent.resolve() for file in recorded):  # not of a folder that was moved
        by_user.add(("root", Path(run.root)))
    for key, place in _places(arguments):
        outside = not place.expanduser().resolve().is_relative_to(Path.cwd().resolve())
        if outside and (key, place) not in by_user:
            raise MisconfigurationException(
                f"{recorded[-1]}: {key} {place} is outside of the working folder, and a run folder, or a file called "
                f"{run_files.CONFIG} as in one, does not choose where to write; give {key} as a flag, or rename a "
                "file of your own"
            )


def _places(config: Any) -> Iterator[tuple[str, Path]]:
    """Yield the arguments in a configuration that say where to write, with their values."""
    named = ((key.rpartition(".")[2], part) for key, part in walk(config))
    return ((name, Path(part)) for name, part in named if name in _PLACES and isinstance(part, str | os.PathLike))
