"""Run folders that were moved, copied, or are used from another working folder.

The configuration of a run names its tokenizer and its base by where they were when the run started. If they are not
there any more, the tokenizer that the run has saved and the architecture in its checkpoint take their place. So the run
can be validated, resumed and exported without them.
"""

import glob
import json
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments.run import run_folder
from experiments.yaml_files import walk
from lightning_modules.common.hub import is_path
from lightning_modules.common.messages import say
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO

_BASES = ("base", "pretrained")  # arguments of modules that name a model to start from
_ARCHITECTURE = "architecture"  # argument of these modules, and among the hyper-parameters of their checkpoints

Original = dict[str, dict[str, Any]]  # by section: the arguments that were replaced, as the configuration has them


def use_own_files(arguments: Namespace, run: Path, checkpoint: Path | None) -> Original:
    """Replace what the configuration of a run names and what is not there by what the run itself has.

    Args:
        arguments: The arguments of the command; changed in place.
        run: Folder of the run.
        checkpoint: The checkpoint that the command loads, or `None`.

    Returns:
        The arguments that were replaced: they stay as they are in the record of the run.
    """
    replaced: Original = {"data": {}, "model": {}}
    data, model = (arguments[section].get("init_args") or Namespace() for section in ("data", "model"))
    name, own = data.get("tokenizer"), run / "tokenizer"
    if isinstance(name, str) and own.is_dir() and (reason := _is_not_that_of(own, name)):
        say(f"data.tokenizer: {name} {reason}; the tokenizer of the run, {own}, takes its place")
        replaced["data"]["tokenizer"] = name
        data["tokenizer"] = str(own.resolve())
    for key in _BASES:
        name = model.get(key)
        if checkpoint and isinstance(name, str) and is_path(name) and not Path(name).expanduser().exists():
            saved = AtomicCheckpointIO().load_model(checkpoint).get("hyper_parameters") or {}
            if architecture := saved.get(_ARCHITECTURE):
                say(f"model.{key}: {name} does not exist; the model is built as {checkpoint} describes it")
                replaced["model"][_ARCHITECTURE] = model.get(_ARCHITECTURE)
                model[_ARCHITECTURE] = architecture
    return replaced


def _is_not_that_of(own: Path, name: str) -> str:
    """Return why a name is not that of the tokenizer that a run has saved; empty if it is, or is no local folder."""
    path = Path(name).expanduser()
    if name in ("byte", "character") or not is_path(name):
        return ""
    if not path.exists():
        return "does not exist"
    theirs, ours = (_vocabulary(folder) for folder in (path, own))
    return "has another vocabulary than when the run started" if theirs and ours and theirs != ours else ""


def _vocabulary(folder: Path) -> Any:
    """Return what the `tokenizer.json` of a folder says about its tokens, or `None` without a readable one."""
    try:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def check_paths(arguments: Namespace, config: Path) -> None:
    """Refuse relative paths in the configuration of a run that lead to files only from where the run was started.

    Raises:
        MisconfigurationException: If there is one; the message names the folder.
    """
    start = _started_in(config)
    if start is None or start == Path.cwd():
        return
    for section in ("data", "model"):
        for key, value in walk(arguments[section].get("init_args"), section):
            if not isinstance(value, str):
                continue
            path = Path(value)
            is_relative = ("/" in value or path.suffix) and not path.is_absolute()
            if is_relative and not _exists(Path(), value) and _exists(start, value):
                raise MisconfigurationException(
                    f"{key}: {value} is not in the working folder, but in {start}, where the run {config.parent} was "
                    f"started: run the command in that folder, or give another {key} as a flag"
                )


def _started_in(config: Path) -> Path | None:
    """Return the folder in which a run was started, if its folder is still where it was, or `None`."""
    section = run_folder.recorded(config)
    parts = [str(section[key]) for key in ("root", "topic", "study", "name") if section.get(key)]
    below, run = Path(*parts), config.parent.resolve()
    if below.is_absolute() or not parts or run.parts[-len(below.parts) :] != below.parts:
        return None
    return run.parents[len(below.parts) - 1]


def _exists(folder: Path, pattern: str) -> bool:
    try:
        return (folder / pattern).exists() or next(glob.iglob(pattern, root_dir=folder), None) is not None
    except (OSError, ValueError):  # a text that is no path
        return False
