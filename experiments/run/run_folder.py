"""The folder of a run: `runs/<topic>/<name>/`."""

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments.yaml_files import read_yaml
from lightning_modules.common.files import remove_unfinished, try_lock
from lightning_modules.common.messages import say
from lightning_modules.common.run_files import CHECKPOINTS, CONFIG, ENVIRONMENT, METRICS, SUMMARY, checkpoint

# What a run writes before its first batch: how it was started. A summary is the proof that it has done something.
_OF_A_START = re.compile(r"config\w*\.yaml|environment\.json|\.lock|wandb|tokenizer")
_NUMBER = r"(?:[2-9]|[1-9]\d+)"  # of a repeated run; in the name `lr0.05`, 05 is none
# A folder with one of these files is a run's. A config.yaml alone is none: any folder may have a file of that name.
_MARKS = (ENVIRONMENT, METRICS, SUMMARY, checkpoint("last"), checkpoint("best"))


@dataclass
class RunArguments:
    """Where a run writes its files.

    Args:
        name: Name of the run; `null` takes the name of the first configuration file. A new run whose name is taken
            gets a number: `offline`, `offline.2`, `offline.3`.
        root: Folder of all runs; the run folder is `<root>/<topic>/<name>`, or `<root>/<topic>/<study>/<name>`.
        topic: Name of the topic; `null` takes the package of the module.
        study: Study that the run is a part of, and its group in W&B; `null` for none, or for the sweep if a
            `wandb agent` starts the run. Such a run is named after its settings.
    """

    name: str | None = None
    root: str = "runs"
    topic: str | None = None
    study: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path
    topic: str
    is_new: bool  # created for this run, not found
    study: str | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    def checkpoint(self, name: str) -> Path:
        """Return the path of the checkpoint `last` or `best`."""
        return self.path / checkpoint(name)


class Lock:
    """The right to write into a run folder, which one process at a time has, and which ends with the process.

    The checkpoints that a process before has written in part, because it was killed, are removed.

    Args:
        folder: Folder of the run.

    Raises:
        MisconfigurationException: If another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / ".lock"
        opened = try_lock(self._file)
        if opened is None:
            holder = ""
            with contextlib.suppress(FileNotFoundError):
                holder = self._file.read_text(encoding="utf-8").strip()
            raise MisconfigurationException(
                f"{folder} is being trained by {holder or 'another process'}; wait for it or stop it, or give another "
                "--run.name"
            )
        self._open = opened
        if opened.is_exclusive:
            remove_unfinished(folder / CHECKPOINTS)

    def release(self) -> None:
        """Give the right back."""
        self._file.unlink(missing_ok=True)
        self._open.close()


def runs_named(parent: Path, name: str, mark: str = ".") -> list[Path]:
    """Return the existing runs of one name, the newest last: `offline`, `offline.2`, `offline.10`."""
    series = re.compile(re.escape(name) + rf"(?:{re.escape(mark)}({_NUMBER}))?")
    found = [
        (int(match[1] or 1), path)
        for path in parent.glob(f"{glob.escape(name)}*")
        if (match := series.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def claim(root: Path, topic: str, name: str, study: str | None = None) -> RunFolder:
    """Create the folder of a new run, of this name, or with the next number if the name is taken.

    The name of a repeated run, `offline.2`, is followed by `offline.3`; a name that only looks like one, `lr0.2` where
    there is no run `lr0`, by `lr0.2.2`. Only rank 0 creates the folder; the other ranks get a path that they do not
    write to.

    Raises:
        MisconfigurationException: If the root is a link to a folder that does not exist.
    """
    mark = "." if study is None else "+"  # in a study, names end in numbers: `dropout=0.2`
    parent, base = root / topic / (study or ""), name
    if (repeated := re.fullmatch(rf"(.+){re.escape(mark)}{_NUMBER}", name)) and (parent / repeated[1]).exists():
        base = repeated[1]
    taken = runs_named(parent, base, mark)
    number = 1 + max((int(path.name[len(base) + 1 :] or 1) for path in taken), default=0)
    while True:
        path = parent / (base if number == 1 else f"{base}{mark}{number}")
        if not os.path.lexists(parent / name):  # a link to nothing takes a name too
            path = parent / name
        try:
            if rank_zero_only.rank == 0:
                path.mkdir(parents=True)
            return RunFolder(path, topic, is_new=True, study=study)
        except FileExistsError as error:
            if Path(error.filename) != path:  # a folder above it
                raise MisconfigurationException(
                    f"{error.filename} is a link to {os.readlink(error.filename)}, which does not exist; create that "
                    "folder, or give another --run.root"
                ) from error
            number += 1  # another run has just taken it


def newest(root: Path, topic: str, name: str, study: str | None = None) -> RunFolder | None:
    """Return the newest run of a name that has a checkpoint, or else the newest that began to train, or `None`.

    So neither a start that failed nor an evaluation of untrained weights hides a run that can be continued. A name with
    a number names that run alone. The name of an arm of a study names the folder of the arm, whatever it holds: a fit
    that was killed before it wrote anything is started again there.
    """
    runs = _runs(root, topic, name, study)
    begun = [run for run in runs if study is not None or (run.path / CONFIG).is_file()]
    return _newest_with(("last", "best"), runs) or (begun[-1] if begun else None)


def find(root: Path, topic: str, name: str, study: str | None = None, checkpoint: str = "last") -> RunFolder:
    """Return the newest run of a name that has the checkpoint `last` or `best`, or else the newest run.

    In a study, return the run of exactly the name.

    Raises:
        MisconfigurationException: If there is no run of this name.
    """
    runs = _runs(root, topic, name, study)
    if not runs:
        parent = root / topic / (study or "")
        existing = ", ".join(sorted(p.name for p in parent.glob("*") if is_run(p))) or "no run at all"
        raise MisconfigurationException(f"ckpt_path: there is no run {parent / name} to continue; there is {existing}")
    return _newest_with((checkpoint,), runs) or runs[-1]


def _runs(root: Path, topic: str, name: str, study: str | None) -> list[RunFolder]:
    """Return the runs of a name, the newest last.

    In a study, return only the run of exactly the name: a repeated run, `lr=0.1+2`, can have other settings.
    """
    parent = root / topic / (study or "")
    exact = [parent / name] if (parent / name).is_dir() else []
    found = runs_named(parent, name) if study is None else exact
    return [RunFolder(path, topic, is_new=False, study=study) for path in found]


def _newest_with(checkpoints: Sequence[str], runs: Sequence[RunFolder]) -> RunFolder | None:
    """Return the newest run that has one of the checkpoints, and say which newer ones have none."""
    having = [run for run in runs if any(run.checkpoint(name).is_file() for name in checkpoints)]
    if not having:
        return None
    newer = runs[runs.index(having[-1]) + 1 :]
    if newer:
        passed = ", ".join(str(run.path) for run in newer[:3]) + (f" and {len(newer) - 3} more" if newer[3:] else "")
        what = f"checkpoint `{checkpoints[0]}`" if len(checkpoints) == 1 else "checkpoint"
        say(f"{having[-1].path} is the newest run with a {what}; without one: {passed}")
    return having[-1]


def of_checkpoint(checkpoint: Path) -> RunFolder | None:
    """Return the run folder that a checkpoint file lies in, or `None`."""
    path = checkpoint.parent.parent
    if checkpoint.parent.name != CHECKPOINTS or not (path / CONFIG).is_file():
        return None
    return _existing(path, recorded(path / CONFIG))


def of_config(config: Path, arguments: RunArguments) -> RunFolder | None:
    """Return the run that wrote a configuration, or `None` if no run did or the arguments name another run.

    The folder may have been moved since, and newer runs of the same name may exist.
    """
    if not is_run(config.parent) or not config.is_file():
        return None
    section = recorded(config)
    if any(section.get(name) != getattr(arguments, name) for name in ("name", "root", "topic", "study")):
        return None
    return _existing(config.parent, section)


def _existing(folder: Path, section: Mapping[str, Any]) -> RunFolder:
    """Return the run in a folder, with what the section `run:` of its configuration says."""
    return RunFolder(folder, section.get("topic") or folder.parent.name, is_new=False, study=section.get("study"))


def is_run(folder: Path) -> bool:
    """Return whether a folder holds the files of a run."""
    return any((folder / mark).exists() for mark in _MARKS)


def holds_only_a_start(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a run writes before its first batch."""
    return all(_OF_A_START.fullmatch(path.name) for path in folder.glob("*"))


def check_links(folder: Path) -> None:
    """Raise a `MisconfigurationException` if a link leads out of the folder of a run: its target would be written."""
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                raise MisconfigurationException(
                    f"{path} is a link to {path.resolve()}, outside of the run folder; replace it by what it links to"
                )
        folders[:] = [name for name in folders if name != "wandb"]  # W&B links to its own logs


def recorded(config: Path, name: str = "run") -> dict[str, Any]:
    """Return a section of a recorded configuration, `run:` or another; empty if it has none."""
    content = read_yaml(config)
    section = content.get(name) if isinstance(content, dict) else None
    return section if isinstance(section, dict) else {}


def temporary(topic: str) -> RunFolder:
    """Return a temporary folder of this process for a trial run (`trainer.fast_dev_run`), which leaves no files."""
    return RunFolder(Path(tempfile.mkdtemp(prefix=f"{topic}-")), topic, is_new=True)
