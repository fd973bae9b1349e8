"""Which classes a configuration may name.

What the user names is trusted: a flag, and a YAML that is not in a run folder. A run folder can be a stranger's, and to
import a class is to run the code of its file. So the `config.yaml` of a run folder may name classes of this project,
and those of PyTorch and Lightning that neither run commands nor write where they are told; other packages need the
user's word: `--allow PACKAGE`, or an installed package with an entry point in the group `llm_train.classes`.
"""

import contextlib
import importlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments import names
from experiments.errors import UserError
from experiments.run import run_folder
from experiments.yaml_files import load_yaml, read_yaml
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
_CONFIG = re.compile(r"config(_\w+)?\.yaml")
_CLASS_PATH = re.compile(r"([A-Za-z_]\w*\.)+[A-Za-z_]\w*")
_NOT_CLASSES = ("--allow", "--ckpt_path", "--run.")  # flags whose values are no classes
# Arguments of classes that say where to write.
_PLACES = ("cache_dir", "dirpath", "filename", "log_dir", "name", "root_dir", "save_dir", "sub_dir", "version")
# Keys that a run does not record, because they are for one session.
SESSION_KEYS = ("allow", "auto_resume", "ckpt_path", "config", "return_predictions", "verbose", "weights_only")

_verdicts: dict[str, bool] = {}  # of the command that is running


def run_folder_of(config: Path) -> Path | None:
    """Return the run folder that a configuration lies in at any depth, or `None`."""
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
            checkpoint, or a place outside of the working folder to write to.
    """
    recorded = [file for file in files(args) if run_folder_of(file)]
    named, packages = _named_by_user(args), allowed(args)
    for file in recorded:
        _check_recorded(file, args)
    global _verdicts
    before = _verdicts
    _verdicts = _verdicts_on(packages, named if recorded else None)
    try:
        with restricted_imports(_verdicts):
            yield [*named, *packages]
    finally:
        _verdicts = before


def _named_by_user(args: Sequence[str]) -> list[str]:
    """Return the texts that may be class paths in the flags of a command line and in its files but those of runs."""
    own = (file for file in files(args) if not run_folder_of(file))
    return [*_named_by_flags(args), *(path for file in own for path in _named_in(_content(file)))]


def files(args: Sequence[str]) -> list[Path]:
    """Return the configuration files of a command line, in its order."""
    given = (Path(value) for flag, value in _flags(args) if flag in ("-c", "--config"))
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
    return sorted({unit(path) for path in _class_paths(config) if _denies({"*": False} | _KNOWN, path)})


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
        f"{class_path} is not imported, because a run folder names it and it is not a class that this project knows; "
        f"if you trust its code, add --allow {unit(class_path)}"
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


def _named_by_flags(args: Sequence[str]) -> Iterator[str]:
    for flag, value in _flags(args):
        if flag not in ("-c", "--config") and not flag.startswith(_NOT_CLASSES):
            try:
                yield from _named_in(load_yaml(value))
            except yaml.YAMLError:
                continue


def _named_in(config: Any) -> Iterator[str]:
    """Yield the texts in a configuration of the user that may be class paths."""
    if isinstance(config, str) and _CLASS_PATH.fullmatch(config):
        yield config
    elif isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _named_in(value)


def _class_paths(config: Any) -> Iterator[str]:
    """Yield the values of `class_path` in a configuration."""
    if isinstance(config, dict):
        if isinstance(config.get("class_path"), str):
            yield config["class_path"]
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _class_paths(value)


def _content(file: Path) -> Any:
    """Return the content of a YAML file, or `None` if it is not YAML: the parser says so."""
    try:
        return read_yaml(file)
    except UserError:
        return None


def _check_recorded(file: Path, args: Sequence[str]) -> None:
    """Check that the configuration of a run folder chooses neither a checkpoint nor a place outside to write to."""
    content = _content(file)
    if not isinstance(content, dict):
        return
    for key in SESSION_KEYS:
        if content.get(key) is not None:
            raise MisconfigurationException(f"{file}: {key} is not a setting of a run; remove it, or give it as a flag")
    by_flag = {flag.rsplit(".", 1)[-1] for flag, _ in _flags(args)}
    places = [*_places(content)]
    root, *below = (str((content.get("run") or {}).get(key) or "") for key in ("root", "topic", "study", "name"))
    if Path(root, *below).resolve() != file.parent.resolve():
        places.append(("root", root))  # of a folder that was moved
    for key, place in places:
        outside = not Path(place).expanduser().resolve().is_relative_to(Path.cwd().resolve())
        if outside and key not in by_flag:
            raise MisconfigurationException(
                f"{file}: {key} {place} is outside of the working folder, and a run folder does not choose where to "
                f"write; give {key} as a flag"
            )


def _places(config: Any) -> Iterator[tuple[str, str]]:
    if isinstance(config, dict):
        yield from ((key, value) for key, value in config.items() if key in _PLACES and isinstance(value, str))
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _places(value)
