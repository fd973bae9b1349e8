"""The folder that a run leaves behind: `runs/<topic>/<name>/`."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"


@dataclass
class RunArguments:
    """Where a run leaves its files.

    Args:
        name: Name of the run; `null` takes the name of the (first) configuration file. A new run whose name is taken
            gets a number: `offline`, `offline.2`, `offline.3`.
        root: Folder of all runs; a run's own is `<root>/<topic>/<name>`, or `<root>/<topic>/<study>/<name>`.
        topic: Name of the topic; `null` takes that of the module's file.
        study: Study that the run is a part of, and its group in W&B; `null` for none, or for the sweep where a
            `wandb agent` starts the run, which then is named for its settings.
    """

    name: str | None = None
    root: str = "runs"
    topic: str | None = None
    study: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """One run's folder.

    Args:
        path: The folder.
        topic: Its topic.
        is_new: Whether it was made for this run, rather than found.
        study: Its study, if it is a part of one.
    """

    path: Path
    topic: str
    is_new: bool
    study: str | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint `last` or `best`."""
        return self.path / CHECKPOINTS / f"{name}.ckpt"


def numbered(parent: Path, name: str, mark: str = ".") -> list[Path]:
    """The runs of one name that exist, the newest last: `offline`, `offline.2`, `offline.10`."""
    series = re.compile(re.escape(name) + rf"(?:{re.escape(mark)}(\d+))?")
    found = [(int(match[1] or 1), path) for path in parent.glob(f"{name}*") if (match := series.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _mark(study: str | None) -> str:
    """What stands before a run's number; in a study, names end in decimal numbers: `dropout=0`, `dropout=0.2`."""
    return "." if study is None else "+"


def claim(root: Path, topic: str, name: str, study: str | None = None) -> RunFolder:
    """Makes the folder of a new run, under the first number that is free.

    Only the first process of a run makes it; the others get a name that they do not write to.

    Args:
        root: Folder of all runs.
        topic: Topic of the run.
        name: Name of the run; a number at its end is replaced.
        study: Study that the run is a part of.
    """
    mark = _mark(study)
    parent, base = root / topic / (study or ""), re.sub(rf"{re.escape(mark)}\d+$", "", name)
    taken = numbered(parent, base, mark)
    number = 1 + max((int(path.name[len(base) + 1 :] or 1) for path in taken), default=0)
    while True:
        path = parent / (base if number == 1 else f"{base}{mark}{number}")
        if rank_zero_only.rank != 0:
            return RunFolder(path, topic, is_new=True, study=study)
        try:
            path.mkdir(parents=True)
            return RunFolder(path, topic, is_new=True, study=study)
        except FileExistsError:  # another run took it since we looked
            number += 1


def newest(root: Path, topic: str, name: str, study: str | None = None) -> RunFolder | None:
    """The newest run of a name, if there is one; a name with a number is that run alone.

    Args:
        root: Folder of all runs.
        topic: Topic of the run.
        name: Name of the run.
        study: Study that the run is a part of.
    """
    found = numbered(root / topic / (study or ""), name, _mark(study))
    return RunFolder(found[-1], topic, is_new=False, study=study) if found else None


def find(root: Path, topic: str, name: str, study: str | None = None) -> RunFolder:
    """Finds the newest run of a name, see `newest`.

    Args:
        root: Folder of all runs.
        topic: Topic of the run.
        name: Name of the run.
        study: Study that the run is a part of.

    Raises:
        MisconfigurationException: If there is none.
    """
    found = newest(root, topic, name, study)
    if found is None:
        parent = root / topic / (study or "")
        there = ", ".join(sorted(p.name for p in parent.glob("*"))) or "no run at all"
        raise MisconfigurationException(f"ckpt_path: there is no run {parent / name} to continue; there is {there}")
    return found


def of_checkpoint(checkpoint: Path) -> RunFolder | None:
    """The run folder that a checkpoint lies in, if it lies in one."""
    path = checkpoint.parent.parent
    if checkpoint.parent.name != CHECKPOINTS or not (path / CONFIG).is_file():
        return None
    recorded = (yaml.safe_load((path / CONFIG).read_text(encoding="utf-8")) or {}).get("run", {})
    return RunFolder(path, recorded.get("topic", path.parent.name), is_new=False, study=recorded.get("study"))


def temporary(topic: str) -> RunFolder:
    """A folder outside the runs, for a trial run (`trainer.fast_dev_run`) that leaves nothing."""
    return RunFolder(Path(tempfile.mkdtemp(prefix=f"{topic}-")), topic, is_new=True)
