"""Where metrics go: a CSV file in the run folder, and Weights & Biases, online or offline."""

import csv
import json
import netrc
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common.files import write_text

if TYPE_CHECKING:  # imported where used
    import wandb

# What other runs may start from, and where it lies in a run's folder.
_ARTIFACTS = {"config": "config.yaml", "tokenizer": "tokenizer", "model": "checkpoints/best.ckpt"}
_REMEMBERED = Path("wandb", "id.json")
_LONGEST_TAG = 64  # W&B refuses longer ones


@runtime_checkable
class RunLogger(Protocol):
    """A logger that is told where the run leaves its files, once the run has a folder."""

    def attach(self, folder: Path, topic: str, name: str, job_type: str, study: str | None = None) -> None:
        """Binds the logger to a run folder; `job_type` is the subcommand."""


class MetricsCSV(Logger):
    """Appends the metrics to `metrics.csv` in the run folder: one row a step, one column a metric.

    `step` is the number of optimiser steps done. A resumed run goes on in the same file: rows of steps that the
    checkpoint did not have are repeated by the resumed run, so they are dropped when it starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """Part of Lightning's interface; the run folder has the name."""
        return ""

    @property
    def version(self) -> str:
        """Part of Lightning's interface; the run folder has the version."""
        return ""

    def attach(self, folder: Path, topic: str, name: str, job_type: str, study: str | None = None) -> None:
        """Writes to `folder/metrics.csv` from now on, or to that of the subcommand where it is not `fit`."""
        self._path = folder / ("metrics.csv" if job_type == "fit" else f"metrics_{job_type}.csv")
        if self._path.is_file():
            with self._path.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

    @property
    def unwritten(self) -> list[dict[str, Any]]:
        """The row that is not in the file yet: a checkpoint must have it, or it would be lost with the process."""
        return [dict(row) for row in self._rows]

    def go_on_from(self, step: int, unwritten: list[dict[str, Any]]) -> None:
        """Drops the rows of later steps, which a resumed run is about to repeat, and takes up what was not written.

        Args:
            step: Optimiser steps that the checkpoint has.
            unwritten: What was unwritten then.
        """
        rows, again = [], {str(row["step"]) for row in unwritten}
        if self._path is not None and self._path.is_file():
            with self._path.open(newline="") as file:
                whole = [line for line in file if line.endswith("\n")]
            rows = [row for row in csv.DictReader(whole) if int(row["step"]) <= step and row["step"] not in again]
            rows = sorted([*rows, *unwritten], key=lambda row: int(row["step"]))
            self._columns += dict.fromkeys(name for row in rows for name in row if name not in self._columns)
            self._rewrite(rows[:-1])
        of_this_session, self._rows = self._rows, [{**row, "step": int(row["step"])} for row in rows[-1:]]
        for row in of_this_session:  # measures of the untrained model, say
            if self._rows and self._rows[-1]["step"] == row["step"]:
                self._rows[-1].update(row)
            else:
                self._rows.append(row)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds metrics to the row of a step."""
        metrics = dict(metrics)
        epoch = int(metrics.pop("epoch", 0))
        if not self._rows or self._rows[-1]["step"] != steps_done(step):
            self._rows.append({"step": steps_done(step), "epoch": epoch})
        self._rows[-1].update({name: float(value) for name, value in metrics.items()})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Does nothing: `config.yaml` has them."""

    @rank_zero_only
    def save(self) -> None:
        """Writes all rows but the last, to which metrics of the same step may still come; Lightning calls it often."""
        rows, self._rows = self._rows[:-1], self._rows[-1:]
        self._write(rows)

    @rank_zero_only
    def flush(self) -> None:
        """Writes the last row too."""
        rows, self._rows = self._rows, []
        self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if self._path is None or not rows:
            return
        try:
            self._add(rows)
        except OSError as error:
            reason = f"{error.strerror}: the metrics could not be written"
            raise OSError(error.errno, reason, str(self._path)) from error

    def _add(self, rows: list[dict[str, Any]]) -> None:
        new = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in self._columns]
        if new and self._columns:  # a metric seen for the first time gets a column
            with self._path.open(newline="") as file:
                earlier = list(csv.DictReader(file))
            self._columns += new
            self._rewrite(earlier + rows)
            return
        self._columns += new
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if new:
                writer.writeheader()
            writer.writerows(rows)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left."""
        self.flush()


class WandbRecorder(WandbLogger):
    """Weights & Biases: online where the user is logged in, otherwise files in the run folder to upload later.

    The run's group is its study, or its topic where it is in none; both are its tags, and its job type is the
    subcommand. A resumed run continues the same W&B run. `WANDB_MODE`, `WANDB_PROJECT`, `WANDB_ENTITY`,
    `WANDB_RUN_GROUP`, `WANDB_TAGS` and the id that a sweep gives are respected.

    A fit leaves artifacts: `config-ID`, `tokenizer-ID` and, if asked for, `model-ID`. A run that takes files from the
    folder of another run, such as its tokenizer, uses that run's artifact.

    Args:
        project: Project the runs go to; `null` takes `WANDB_PROJECT`, or `llm-train`.
        group: Group of the run; `null` takes `WANDB_RUN_GROUP`, or the study, or the topic.
        tags: Tags of the run besides its topic and study; `null` takes `WANDB_TAGS`.
        notes: A text that describes the run.
        log_model: Whether the best checkpoint is an artifact too.
    """

    def __init__(
        self,
        project: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        log_model: bool = False,
    ) -> None:
        super().__init__(
            project=project or os.environ.get("WANDB_PROJECT", "llm-train"),
            group=group or os.environ.get("WANDB_RUN_GROUP"),
            tags=tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag],
            notes=notes,
        )
        self.log_model = log_model
        self._wandb_init.pop("anonymous")  # which wandb no longer knows
        self._folder: Path | None = None

    def attach(self, folder: Path, topic: str, name: str, job_type: str, study: str | None = None) -> None:
        """Keeps the run's files in `folder/wandb`, and its id in `folder/wandb/id.json`."""
        self._folder = folder
        self._wandb_init |= {
            "dir": str(folder),
            "name": self._wandb_init.get("name") or name,
            "group": self._wandb_init.get("group") or study or topic,
            "tags": list(dict.fromkeys(tag[:_LONGEST_TAG] for tag in (*self._wandb_init["tags"], topic, study) if tag)),
            "job_type": job_type,
            "mode": _mode(),
        }
        self._save_dir = str(folder)
        known = _remembered(folder)
        if known and "WANDB_RUN_ID" not in os.environ:  # a sweep gives each run an id of its own
            self._wandb_init["id"] = self._id = known["id"]

    @property
    def experiment(self) -> Any:
        """The W&B run, started when it is first asked for; on other ranks than 0 an object that does nothing."""
        if self._experiment is None:
            os.environ.setdefault("WANDB_SILENT", "true")  # the closing summary says what matters
            run = super().experiment
            if self._experiment is not None and self._folder is not None:
                _remember(self._folder, run.id, _remembered(self._folder).get("artifacts", []))
            return run
        return self._experiment

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Within the context W&B may fail, however it does: the run says so once, and goes on without it."""
        try:
            yield
        except Exception as error:
            import wandb

            print(f"W&B failed ({type(error).__name__}: {error}): the run goes on without it", file=sys.stderr)
            self._experiment = wandb.init(mode="disabled")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds metrics to the history, at the number of optimiser steps done (`trainer/global_step`)."""
        with self.tolerated():
            super().log_metrics(metrics, steps_done(step))

    def log_image(self, key: str, images: list[Any], **kwargs: Any) -> None:
        """Logs pictures; see `WandbLogger`."""
        with self.tolerated():
            super().log_image(key, images, **kwargs)

    def log_table(self, key: str, **kwargs: Any) -> None:
        """Logs a table; see `WandbLogger`."""
        with self.tolerated():
            super().log_table(key, **kwargs)

    def log_artifacts(self) -> None:
        """Logs what the run has made, for other runs to start from."""
        with self.tolerated():
            self._log_artifacts()

    def _log_artifacts(self) -> None:
        if self.experiment.disabled:
            return
        asked_for = [kind for kind in _ARTIFACTS if kind != "model" or self.log_model]
        kinds = [kind for kind in asked_for if (self._folder / _ARTIFACTS[kind]).exists()]
        for kind in kinds:
            self.experiment.log_artifact(_artifact(kind, self._folder, self.experiment.id))
        _remember(self._folder, self.experiment.id, kinds)

    def use_files(self, paths: Iterable[str]) -> None:
        """Says which runs this one starts from: those in whose folders some of these files lie.

        Args:
            paths: Paths, and perhaps texts that are none.
        """
        with self.tolerated():
            self._use_files(paths)

    def _use_files(self, paths: Iterable[str]) -> None:
        if self.experiment.disabled:
            return
        used = set()
        for path in map(Path, paths):
            folder = next((parent for parent in path.parents if os.path.isfile(parent / _REMEMBERED)), None)
            if folder is not None and folder.resolve() != self._folder.resolve():
                part = path.relative_to(folder).parts[0]
                used.add((folder, "model" if part == "checkpoints" else part))
        for folder, part in sorted(used):
            other = _remembered(folder)
            kind = part if part in other["artifacts"] else "config"
            if kind in other["artifacts"]:
                # What `use_artifact` does online; offline it refuses, though this is uploaded as well as all the rest.
                self.experiment._log_artifact(
                    _artifact(kind, folder, other["id"]), aliases=[], is_user_created=True, use_after_commit=True
                )

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run, so that another can begin in this process."""
        if self._experiment is not None:
            with self.tolerated():
                self._experiment.finish(exit_code=exit_code)
            self._experiment = None

    @property
    def sync_command(self) -> str | None:
        """What uploads the files of an offline run, or nothing where there is nothing to upload."""
        if self._folder is None or self._wandb_init.get("mode") != "offline":
            return None
        folders = sorted(self._folder.glob("wandb/offline-run-*"))
        return f"wandb sync {' '.join(map(str, folders))}" if folders else None

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Does nothing: the run's configuration is the resolved YAML, see `experiments.run_record`."""


def _artifact(kind: str, folder: Path, run_id: str) -> "wandb.Artifact":
    """A part of a run folder as W&B keeps it: for the run that made it and for those that use it the same."""
    import wandb

    artifact = wandb.Artifact(f"{kind}-{run_id}", type=kind)
    path = (folder / _ARTIFACTS[kind]).absolute()
    if path.is_dir():
        artifact.add_dir(str(path), policy="immutable")
    else:
        artifact.add_file(str(path))  # a copy, since a resumed run writes the file anew
    return artifact


def _remembered(folder: Path) -> dict[str, Any]:
    """The id of the W&B run of a folder, and the kinds of artifacts that it has logged; nothing where it has none."""
    file = folder / _REMEMBERED
    return {"artifacts": []} | json.loads(file.read_text()) if file.is_file() else {}


def _remember(folder: Path, run_id: str, artifacts: list[str]) -> None:
    (folder / _REMEMBERED).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / _REMEMBERED, json.dumps({"id": run_id, "artifacts": artifacts}))


def steps_done(step: int | None) -> int:
    """Lightning counts the steps it logs from 0; we say how many are done, as `trainer.global_step` does."""
    return 0 if step is None else step + 1


def _mode() -> str:
    """Online where an account is known, offline otherwise; never a prompt."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        logged_in = "WANDB_API_KEY" in os.environ or netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # no such file, or one that wandb could not read either
        logged_in = False
    return "online" if logged_in else "offline"
