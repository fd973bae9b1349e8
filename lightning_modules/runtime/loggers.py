"""Loggers of a run: a CSV file in the run folder, and Weights & Biases, online or offline."""

import contextlib
import csv
import io
import netrc
import os
import shlex
import subprocess
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_modules.common import run_files
from lightning_modules.common.files import complete_lines, read_json, write_json, write_text
from lightning_modules.common.messages import say
from lightning_modules.runtime.private_names import OpenWandbLogger, use_artifact, wandb_service

if TYPE_CHECKING:  # wandb is imported where it is used: it is slow to import
    import wandb

_ARTIFACTS = {"config": run_files.CONFIG, "tokenizer": "tokenizer", "model": run_files.checkpoint("best")}
_RECORD = Path("wandb", "id.json")  # the id of the W&B run, and the kinds of its artifacts
_LONGEST_UPLOAD = "120"  # at the end of a run, in seconds
_GRACE = 20.0  # more seconds, after which W&B is ended: it writes what is logged to its file every 15 seconds
_MOST_NAMED = 2  # folders of offline runs; more are a pattern
_LONGEST_TAG = 64  # W&B refuses longer ones
_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


@runtime_checkable
class RunLogger(Protocol):
    """A logger that writes into the run folder, which is chosen after the logger is built."""

    def attach(self, folder: Path, topic: str, name: str, job_type: str, study: str | None = None) -> None:
        """Set the run folder and the names of the run; `job_type` is the subcommand, such as `fit`."""


class MetricsCSV(Logger):
    """Logger that writes `metrics.csv` in the run folder: one row for each step, one column for each metric.

    `step` is the number of optimiser steps done. A resumed run continues the same file: rows of steps after the
    checkpoint are dropped when it starts, because it repeats those steps.
    """

    name = version = ""  # required by Lightning; the run folder already has a name

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []

    def attach(self, folder: Path, topic: str, name: str, job_type: str, study: str | None = None) -> None:
        """Write to `folder/metrics.csv`, or to `folder/metrics_SUBCOMMAND.csv` if the subcommand is not `fit`."""
        self._path = folder / run_files.of_command(run_files.METRICS, job_type)
        if self._path.is_file():
            with self._path.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

    @property
    def unwritten(self) -> list[dict[str, Any]]:
        """The row that is not in the file yet. A checkpoint must hold it, or it would be lost if the process died."""
        return [dict(row) for row in self._rows]

    def go_on_from(self, step: int, unwritten: list[dict[str, Any]]) -> None:
        """Drop the rows of steps after that of the checkpoint, and restore the row that was `unwritten` in it."""
        restored = {str(row["step"]) for row in unwritten}
        kept = [row for row in self._read() if int(row["step"]) <= step and row["step"] not in restored]
        rows = sorted([*kept, *unwritten], key=lambda row: int(row["step"]))
        if self._path is not None and self._path.is_file():
            self._rewrite(rows[:-1], columns_of=rows)
        of_this_session, self._rows = self._rows, [{**row, "step": int(row["step"])} for row in rows[-1:]]
        for row in of_this_session:  # metrics of the untrained model, for example
            self._row(row["step"]).update(row)

    def restore(self, step: int, unwritten: list[dict[str, Any]]) -> None:
        """Drop the rows of steps after the checkpoint with which a run ends, and write what it has and the file lacks.

        A row in the file stays as it is: it may have metrics that were logged after the checkpoint.
        """
        read = self._read()
        rows = [row for row in read if int(row["step"]) <= step]
        written = {int(row["step"]) for row in rows}
        missing = [row for row in unwritten if int(row["step"]) not in written]
        if missing or len(rows) < len(read):
            self._rewrite(sorted([*rows, *missing], key=lambda row: int(row["step"])), columns_of=missing)

    def _row(self, step: int) -> dict[str, Any]:
        if not self._rows or self._rows[-1]["step"] != step:
            self._rows.append({"step": step})
        return self._rows[-1]

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step; see `steps_done` for `step`."""
        values = {name: float(value) for name, value in metrics.items()}
        row = self._row(steps_done(step))
        row.setdefault("epoch", int(values.pop("epoch", 0)))
        row.update(values)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Do nothing: `config.yaml` has the hyper-parameters."""

    def save(self) -> None:
        """Write all rows but the last, to which metrics of the same step may be added; Lightning calls this often."""
        self.flush(keep=1)

    @rank_zero_only
    def flush(self, keep: int = 0) -> None:
        """Write all rows except the last `keep` ones."""
        end = len(self._rows) - keep
        rows, self._rows = self._rows[:end], self._rows[end:]
        try:
            self._add(rows)
        except OSError as error:
            reason = f"{error.strerror}: the metrics could not be written"
            raise OSError(error.errno, reason, str(self._path)) from error

    def finalize(self, status: str) -> None:
        """Write all rows."""
        self.flush()

    def _add(self, rows: list[dict[str, Any]]) -> None:
        if self._path is None or not rows:
            return
        if any(name not in self._columns for row in rows for name in row):
            self._rewrite(self._read() + rows, columns_of=rows)
        else:
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(rows)

    def _read(self) -> list[dict[str, Any]]:
        """Return the complete rows of the file; a killed process may leave half of one."""
        if self._path is None or not self._path.is_file():
            return []
        return list(csv.DictReader(complete_lines(self._path)))

    def _rewrite(self, rows: list[dict[str, Any]], columns_of: list[dict[str, Any]]) -> None:
        """Replace the file by one with these rows, and with new columns for the metrics in `columns_of`."""
        assert self._path is not None
        new = dict.fromkeys(name for row in columns_of for name in row if name not in self._columns)
        text = io.StringIO()
        writer = csv.DictWriter(text, [*self._columns, *new])
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path, text.getvalue())
        self._columns += new  # the file has them now


class WandbRecorder(OpenWandbLogger):
    """Logger for Weights & Biases: online if the user is logged in, otherwise files in the run folder to upload later.

    The group of the run is its study, or its topic without a study; both are its tags, and its job type is the
    subcommand. A resumed run continues the same W&B run. `WANDB_MODE`, `WANDB_PROJECT`, `WANDB_ENTITY`,
    `WANDB_RUN_GROUP`, `WANDB_TAGS` and the id that a sweep gives are respected.

    A fit logs artifacts: `config-ID`, `tokenizer-ID` and, if `log_model` is set, `model-ID`. A run that reads files
    from the folder of another run, such as its tokenizer, uses the artifact of that run.

    At the end a run waits two minutes at most for W&B to log the artifacts and to upload what is left, so that a
    machine that has lost its network can exit; with `log_model` it waits as long as the server answers.
    `WANDB_FINISH_TIMEOUT` sets another number of seconds, 0 for no limit. If W&B does not keep the limit itself, its
    process is ended 20 seconds later; its telemetry can take 15 more. Versions of wandb before 0.31 can wait longer.

    Args:
        project: Project of the run; `null` takes `WANDB_PROJECT`, or `llm-train`.
        group: Group of the run; `null` takes `WANDB_RUN_GROUP`, or the study, or the topic.
        tags: Tags of the run besides its topic and study; `null` takes `WANDB_TAGS`.
        notes: Description of the run.
        log_model: Whether the best checkpoint is logged as an artifact too.
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
        self.settings.pop("anonymous")  # an argument that wandb no longer has
        self._folder: Path | None = None
        self._limit = float(_LONGEST_UPLOAD)
        self._waits_for_model = False
        self._is_late = False

    def attach(self, folder: Path, topic: str, name: str, job_type: str, study: str | None = None) -> None:
        """Keep the files of the run in `folder/wandb`, and its id in `folder/wandb/id.json`."""
        self._folder = folder
        given = self.settings
        given |= {
            "name": given.get("name") or name,
            "group": given.get("group") or study or topic,
            "tags": list(dict.fromkeys(tag[:_LONGEST_TAG] for tag in (*given["tags"], topic, study) if tag)),
            "job_type": job_type,
            "mode": _mode(),
        }
        self.store_in(str(folder.absolute()))  # the process of W&B may have another working folder
        recorded = _recorded(folder)
        if "id" in recorded and "WANDB_RUN_ID" not in os.environ:  # a sweep gives each run an id of its own
            self.continue_run(recorded["id"])

    @property
    def experiment(self) -> Any:
        """The W&B run, started at the first access; an object that does nothing on ranks other than 0."""
        if self.run is not None:
            return self.run
        os.environ.setdefault("WANDB_SILENT", "true")  # the closing lines of the run say what is needed
        os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
        if not self.log_model:
            os.environ.setdefault("WANDB_FINISH_TIMEOUT", _LONGEST_UPLOAD)
        with self.tolerated():
            given = os.environ.get("WANDB_FINISH_TIMEOUT")
            self._limit, self._waits_for_model = float(given or _LONGEST_UPLOAD), self.log_model and not given
            self._prepare()
            run = super().experiment
            if self.run is not None and self._folder is not None:
                _record(self._folder, run.id, _recorded(self._folder)["artifacts"])
            return run
        return self.run  # it has failed

    @rank_zero_only
    def _prepare(self) -> None:
        """Choose a mode that can work, and read W&B's settings."""
        import wandb

        os.environ |= {"WANDB_MODE": self.settings["mode"]} if self.settings.get("mode") else {}
        if not os.environ.get("WANDB_API_KEY"):
            os.environ.pop("WANDB_API_KEY", None)  # W&B refuses an empty one
        if self.settings.get("mode") == "online" and not _answers(_address()):
            say(f"W&B: {_address()} does not answer: the record of the run is kept offline")
            self.settings["mode"] = os.environ["WANDB_MODE"] = "offline"
        # W&B reads wandb/settings of the working folder; in a run folder they could be a stranger's.
        elsewhere = tempfile.gettempdir() if _RECORD.is_file() or Path(run_files.CONFIG).is_file() else os.getcwd()
        with contextlib.chdir(elsewhere):
            wandb.setup()

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Report any failure of W&B in this context in one line, and continue the run without W&B."""
        try:
            yield
        except Exception as error:
            if not self._is_late:
                say(f"W&B failed ({' '.join(f'{type(error).__name__}: {error}'.split())}): the run goes on without it")
            self.run = _NoRun(self.run)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the history, at the number of optimiser steps done (`trainer/global_step`)."""
        with self.tolerated():
            super().log_metrics(metrics, steps_done(step))

    def log_image(self, key: str, images: list[Any], **kwargs: Any) -> None:
        """Log images; see `WandbLogger`."""
        with self.tolerated():
            super().log_image(key, images, **kwargs)

    def log_table(self, key: str, **kwargs: Any) -> None:
        """Log a table; see `WandbLogger`."""
        with self.tolerated():
            super().log_table(key, **kwargs)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Do nothing: the resolved YAML is logged, see `experiments.run.run_record`."""

    def _log_artifacts(self) -> None:
        with self.tolerated():
            if self.experiment.disabled or self._folder is None:
                return
            wanted = [kind for kind in _ARTIFACTS if kind != "model" or self.log_model]
            kinds = [kind for kind in wanted if (self._folder / _ARTIFACTS[kind]).exists()]
            for kind in kinds:
                self.experiment.log_artifact(_artifact(kind, self._folder, self.experiment.id))
            _record(self._folder, self.experiment.id, kinds)

    def use_files(self, paths: Iterable[str]) -> None:
        """Log artifacts of other runs as inputs of this run, for the files that are in the folders of those runs."""
        with self.tolerated():
            if self.experiment.disabled or self._folder is None:
                return
            used = set()
            for path in map(Path, paths):
                folder = next((parent for parent in path.parents if os.path.isfile(parent / _RECORD)), None)
                if folder is not None and folder.resolve() != self._folder.resolve():
                    used.add((folder, path.relative_to(folder).parts[0].replace(run_files.CHECKPOINTS, "model")))
            for folder, part in sorted(used):
                other = _recorded(folder)
                kind = part if part in other["artifacts"] else "config"
                if kind in other["artifacts"]:
                    use_artifact(self.experiment, _artifact(kind, folder, other["id"]))

    def finish(self, exit_code: int, with_artifacts: bool = False) -> None:
        """End the W&B run, so that another can begin in this process.

        Args:
            exit_code: 0 for a success.
            with_artifacts: Whether to log the files of the run that other runs can start from.
        """
        if self.run is None:
            return
        import wandb

        folder, ended, self._is_late = Path(self.run.dir).parent, threading.Event(), False
        if self._limit > 0 and (service := wandb_service()) is not None:
            threading.Thread(target=self._watch, args=(service, folder, ended), daemon=True).start()
        try:
            if with_artifacts:
                self._log_artifacts()
            with self.tolerated():
                try:
                    self.run.finish(exit_code=exit_code)
                except TimeoutError:
                    self._give_up(folder)
            if self._is_late or isinstance(self.run, _NoRun):
                with contextlib.suppress(Exception, SystemExit):  # it exits if W&B's process has failed
                    wandb.teardown()
                wandb.run = None  # W&B leaves a run there that it could not end
            ended.set()  # not after a signal: then W&B ends when this process exits, which the watch limits too
        finally:
            self.run = None

    def _watch(self, service: subprocess.Popen[bytes], folder: Path, ended: threading.Event) -> None:
        """End W&B's process if it is late: while it repeats a request for an artifact, it does not keep its limit."""
        while not ended.wait(self._limit + _GRACE):
            if not (self._waits_for_model and _answers(_address())):
                self._give_up(folder)
                service.kill()
                return

    def _give_up(self, folder: Path) -> None:
        if not self._is_late:
            self._is_late = True
            command = f"wandb sync {shlex.quote(os.path.relpath(folder))}"
            say(f"W&B: the upload has not ended in time; `{command}` uploads the rest of the history")

    @property
    def sync_command(self) -> str | None:
        """The command that uploads the files of an offline run, or `None` if there are none."""
        if self._folder is None or self.settings.get("mode") != "offline":
            return None
        folders = sorted(map(str, self._folder.glob("wandb/offline-run-*")))
        if len(folders) > _MOST_NAMED:
            return f"wandb sync {shlex.quote(str(self._folder))}/wandb/offline-run-*"
        return f"wandb sync {shlex.join(folders)}" if folders else None


class _NoRun:
    """A W&B run that does nothing, in place of one that W&B cannot make, or of one that has failed and can only end."""

    disabled = True
    dir = ""

    def __init__(self, failed: Any) -> None:
        if failed is not None:
            self.dir, self.finish = failed.dir, failed.finish

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


def _artifact(kind: str, folder: Path, run_id: str) -> "wandb.Artifact":
    """Return a part of a run folder as a W&B artifact, the same for the run that made it and for those that use it."""
    import wandb

    artifact = wandb.Artifact(f"{kind}-{run_id}", type=kind)
    path = (folder / _ARTIFACTS[kind]).absolute()
    if path.is_dir():
        artifact.add_dir(str(path), policy="immutable")
    else:
        artifact.add_file(str(path))  # a copy, since a resumed run writes the file again
    return artifact


def _recorded(folder: Path) -> dict[str, Any]:
    return {"artifacts": []} | read_json(folder / _RECORD, {})


def _record(folder: Path, run_id: str, artifacts: list[str]) -> None:
    write_json(folder / _RECORD, {"id": run_id, "artifacts": artifacts})


def steps_done(step: int | None) -> int:
    """Return the number of optimiser steps done for a step of Lightning: from 0, or `None` before the first."""
    return 0 if step is None else step + 1


def _mode() -> str:
    """Return W&B's mode: online if an account is known, offline otherwise; there is never a prompt."""
    if mode := os.environ.get("WANDB_MODE", "").strip().lower():
        if mode in _MODES:
            return mode
        say(f"WANDB_MODE: there is no {mode!r}, only {', '.join(_MODES)}; the record of the run is kept offline")
        return "offline"
    host = urlsplit(_address()).hostname
    try:
        logged_in = bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):  # no such file, or one that wandb cannot read either
        logged_in = False
    return "online" if logged_in else "offline"


def _address() -> str:
    """Return the address of the W&B server."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _answers(address: str) -> bool:
    """Return whether a server answers within five seconds; W&B would try for three minutes."""
    import requests

    try:
        requests.head(address, timeout=5)
    except requests.RequestException:
        return False
    return True
