"""The record of a run: its configuration, environment and summary, and the closing lines for the user."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments import names
from experiments.parser import ExperimentParser
from experiments.run import monitored
from experiments.run.opening import block, opening_lines
from experiments.run.run_folder import RunFolder, of_checkpoint
from experiments.trust import SESSION_KEYS, unknown_packages
from experiments.yaml_files import texts_in
from lightning_modules.common import run_files
from lightning_modules.common.files import read_json, write_json, write_text
from lightning_modules.common.messages import say
from lightning_modules.runtime import private_names
from lightning_modules.runtime.bfloat16 import has_matrix_units
from lightning_modules.runtime.checkpoint import RunCheckpoint, run_checkpoints
from lightning_modules.runtime.loggers import MetricsCSV, WandbRecorder
from lightning_modules.runtime.stages import lacks_validation

if TYPE_CHECKING:
    from experiments.cli import ExperimentCLI

_UNWRITTEN, _SECONDS = "unwritten_metrics", "seconds_of_the_run"  # in a checkpoint
_PACKAGES = (
    "llm-train",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "jsonargparse",
    "wandb",
    "numpy",
)


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml`, `environment.json` and `summary.json`, logs them to W&B, and prints the closing lines."""

    def __init__(self, parser: LightningArgumentParser, config: Any, cli: "ExperimentCLI") -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.cli = cli
        self._began = time.monotonic()
        self._earlier_seconds = 0.0  # of the sessions before this one, until the checkpoint
        self._unwritten: list[dict[str, Any]] = []
        self._is_recorded = False
        self._unknown_packages: list[str] = []  # whose classes the configuration names

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the configuration and the environment at the start of a run; called on rank 0 only.

        The record of a resumed run is changed when its training starts: until then it may be refused.
        """
        if not self._is_resumed:
            self._record(trainer)

    @property
    def _is_resumed(self) -> bool:
        return self.cli.subcommand == "fit" and bool(self.cli.arguments.get("ckpt_path"))

    def _record(self, trainer: L.Trainer) -> None:
        self._is_recorded = True
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        run = self._run
        whole = self.cli.resolved()
        config = {key: value for key, value in whole.items() if key not in SESSION_KEYS}
        for section, arguments in self.cli.replaced.items():
            config[section].setdefault("init_args", {}).update(arguments)
        self._unknown_packages = unknown_packages(config)
        config["run"] |= {"name": run.name, "topic": run.topic, "study": run.study}
        self._file(run_files.SUMMARY).unlink(missing_ok=True)  # that of an earlier session
        write_text(self._file(run_files.CONFIG), yaml.safe_dump(config, sort_keys=False))

        environment_file = run.path / run_files.ENVIRONMENT
        sessions = read_json(environment_file, [])
        session = environment(trainer)
        if self._is_resumed:
            checkpoint = str(self.cli.arguments["ckpt_path"])
            if not sessions and (parent := of_checkpoint(Path(checkpoint))):  # a branch has the history of its run
                sessions = read_json(parent.path / run_files.ENVIRONMENT, [])
            session["resumed"] = {"checkpoint": checkpoint, "step": trainer.global_step, "changed": self.cli.changes}
        write_json(environment_file, [*sessions, session])
        for logger in _of(WandbRecorder, trainer.loggers):
            with logger.tolerated():
                logger.experiment.config.update(config, allow_val_change=True)
                logger.experiment.config.update({"environment": session}, allow_val_change=True)
            logger.use_files(texts_in({**config, "ckpt_path": whole.get("ckpt_path")}))

    @property
    def _run(self) -> RunFolder:
        assert self.cli.run is not None  # set before the trainer is built
        return self.cli.run

    def _file(self, name: str) -> Path:
        """Return the path of a file of the command in the run folder."""
        return self._run.path / run_files.of_command(name, str(self.cli.subcommand))

    def _seconds(self) -> float:
        return self._earlier_seconds + time.monotonic() - self._began

    def _begin(self, *_: Any, **__: Any) -> None:
        self.cli.has_begun = True

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the record of a resumed run, drop the metrics of steps that it repeats, and print the opening lines.

        Raises:
            MisconfigurationException: If the run validates and the module has no metric; before the first batch.
        """
        monitored.check_tracked(trainer, pl_module)
        if self._is_resumed and trainer.is_global_zero:
            self._record(trainer)
        for logger in _of(MetricsCSV, trainer.loggers) if trainer.is_global_zero else ():
            logger.go_on_from(trainer.global_step, self._unwritten)
        if not trainer.fast_dev_run:
            say(block(opening_lines(trainer, pl_module, self._run.path)))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the row of metrics that is not in the file yet, and how long the run has taken."""
        checkpoint[_SECONDS] = self._seconds()
        checkpoint[_UNWRITTEN] = [row for logger in _of(MetricsCSV, trainer.loggers) for row in logger.unwritten]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the row of metrics that was not in the file, and how long the run has taken, unless it is new."""
        if self._is_resumed and not self._run.is_new:
            self._earlier_seconds = checkpoint.get(_SECONDS, 0.0)
        self._unwritten = checkpoint.get(_UNWRITTEN, [])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the record of a run that is finished."""
        self._close(trainer, pl_module, "finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the record of a run that was stopped, or failed."""
        stopped = isinstance(exception, SystemExit | KeyboardInterrupt)
        self._close(trainer, pl_module, "stopped" if stopped else "failed", None if stopped else exception)

    @rank_zero_only
    def _close(
        self, trainer: L.Trainer, pl_module: L.LightningModule, status: str, error: BaseException | None = None
    ) -> None:
        if self.cli.closed:
            return
        self.cli.closed = True
        if status != "finished" and self.cli.leaves_nothing:
            return
        # Rank 0 alone is here, and may have failed alone: a metric that is not computed yet takes all ranks.
        metrics = {name: float(value) for name, value in private_names.computed_metrics(trainer).items()}
        if not self._is_recorded:  # a resumed run that did not begin to train
            if status != "finished" or self._was_closed_before(trainer):
                return
            self._record(trainer)  # the session before this one failed or was killed after the last step
        self._begin()
        is_fit = self.cli.subcommand == "fit"
        if is_fit and not metrics:  # nothing was left to train
            metrics = {name: value for row in self._unwritten[-1:] for name, value in row.items() if "/" in name}
        best = _best_checkpoint(trainer) if is_fit else None
        summary = {
            "status": status,
            "error": error and f"{type(error).__name__}: {error}",
            "step": trainer.global_step,
            "best": best and {"metric": best.monitor, "value": best.best_score, "step": best.best_step},
            "metrics": metrics,
            "seconds": round(self._seconds(), 1),
            "peak_memory_mib": round(peak_memory() / 2**20),
        }
        if (device := trainer.strategy.root_device).type == "cuda":
            summary["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
        write_json(self._file(run_files.SUMMARY), summary)
        sync_command = None
        for logger in _of(WandbRecorder, trainer.loggers):
            if best:  # W&B's tables show its summary, which has the last values by default
                metric = str(best.monitor)
                shown = {metric: best.best_score, f"best/{metric}": best.best_score, "best/step": best.best_step}
                with logger.tolerated():
                    logger.experiment.summary.update(best.best_metrics | shown)
            logger.finish(exit_code=0 if status == "finished" else 1, with_artifacts=is_fit)
            sync_command = logger.sync_command
        if not trainer.fast_dev_run:
            self._say(pl_module, summary, best.best_metrics if best else {}, sync_command)

    def _was_closed_before(self, trainer: L.Trainer) -> bool:
        """Return whether nothing was left to do in a resumed run whose record is complete, or in a branch; say so."""
        if not self._run.is_new:  # a branch from the last step has no record
            for logger in _of(MetricsCSV, trainer.loggers):
                logger.restore(trainer.global_step, self._unwritten)
            if read_json(self._file(run_files.SUMMARY), {}).get("status") != "finished":
                return False
        for logger in _of(WandbRecorder, trainer.loggers):
            logger.finish(exit_code=0)
        of = self.cli.arguments["ckpt_path"] if self._run.is_new else self._run.path
        say(f"{of} is finished: nothing is left to do")
        return True

    def _say(
        self,
        pl_module: L.LightningModule,
        summary: dict[str, Any],
        of_best: dict[str, float],
        sync_command: str | None,
    ) -> None:
        folder, is_fit = self._run.path, self.cli.subcommand == "fit"
        where = f" at step {summary['step']}" if is_fit else ""
        lines = [("run", f"{folder} ({summary['status']}{where}, {summary['seconds']:.0f} s)")]
        if is_fit and (reason := _ended_early(pl_module.trainer)):
            lines.append(("early", reason))
        if summary["best"]:
            lines.append(("best", "{metric} {value:.4f} at step {step}".format(**summary["best"])))
            lines += [("", line) for line in pl_module.closing_lines(of_best)]
        if is_fit and summary["status"] == "finished" and (folder / "model").is_dir():
            lines.append(("model", f"{folder}/model; the README.md there says how other programs use it"))
        if "peak_gpu_memory_mib" in summary:
            lines.append(("memory", f"{summary['peak_gpu_memory_mib']:,} MiB on the GPU at most"))
        if not is_fit:
            lines += [("result", f"{name} {value:.4f}") for name, value in sorted(summary["metrics"].items())]
            lines += [("result", str(file)) for file in pl_module.result_files]
        if sync_command:
            lines.append(("wandb", sync_command))
        quoted = shlex.quote(str(folder))
        following = None
        if is_fit and summary["status"] == "finished":
            following = self._next_command(pl_module)
        elif is_fit and self._run.checkpoint("last").is_file():
            following = f"llm-train fit -c {quoted}/{run_files.CONFIG} --ckpt_path last"
        if following:
            packages = ",".join(self._unknown_packages)
            lines.append(("next", following + (f" --allow {packages}" if packages else "")))
        say("\n" + block(lines))

    def _next_command(self, pl_module: L.LightningModule) -> str | None:
        """Return the command that the module proposes after a run, or one for which the run has the files."""
        run, quoted = self._run, shlex.quote(str(self._run.path))
        checkpoint = next((name for name in ("best", "last") if run.checkpoint(name).is_file()), "")
        proposed = pl_module.next_command(quoted).replace("--ckpt_path best", f"--ckpt_path {checkpoint}")
        needs = {
            "llm-train generate": run.path / "tokenizer",
            f"{quoted}/tokenizer": run.path / "tokenizer",
            f"--model.base {quoted}": run.path / "model",
            "--ckpt_path": run.checkpoint(checkpoint),
        }
        if not all(path.exists() for text, path in needs.items() if text in proposed):
            proposed = f"llm-train validate -c {quoted}/{run_files.CONFIG} --ckpt_path {checkpoint}"
        is_validation = proposed.startswith("llm-train validate")
        if is_validation and (not checkpoint or lacks_validation(pl_module.trainer)):
            return None
        name = () if f" -c {run.topic}/" in proposed else ("run.name",)  # of a run in the same folder, it is taken
        settings = ("run.root", *name, *pl_module.settings_of_next)
        return " ".join([proposed, *(_given(settings) if proposed.startswith("llm-train fit") else ())])


def _ended_early(trainer: L.Trainer) -> str | None:
    """Return why a run has ended before its last step, if a callback has asked for it, or `None`."""
    if not trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
        return None
    left = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, Timer)]
    if any(seconds is not None and seconds <= 0 for seconds in left):
        return f"before the end of {trainer.max_steps} steps: its time is over" if trainer.max_steps > 0 else None
    stopped_by = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]
    reasons = [str(callback.stopping_reason_message) for callback in stopped_by if callback.stopping_reason_message]
    reason = "; ".join(reasons).replace(" Signaling Trainer to stop.", "")
    length = f" of {trainer.max_steps} steps" if trainer.max_steps > 0 else ""
    return f"before the end{length}: {f'EarlyStopping: {reason}' if reason else 'a callback has stopped the run'}"


def _best_checkpoint(trainer: L.Trainer) -> RunCheckpoint | None:
    """Return the first callback that has written a best checkpoint, once all have written what they have begun."""
    checkpoints = run_checkpoints(trainer)
    for checkpoint in checkpoints:
        try:
            checkpoint.wait()
        except Exception as failed:  # on top of the error that ends the run
            say(str(failed))
    return next((checkpoint for checkpoint in checkpoints if checkpoint.best_score is not None), None)


def _given(settings: Iterable[str]) -> Iterator[str]:
    """Yield the flags of the command line that give some settings, or settings below them, with their values."""
    for flag, value in names.flags(ExperimentParser.command_line):
        if any(f"{flag}.".startswith(f"--{name}.") for name in settings):
            yield f"{flag} {shlex.quote(value)}"


def _of(kind: type, objects: Iterable[object]) -> list[Any]:
    return [item for item in objects if isinstance(item, kind)]


def environment(trainer: L.Trainer) -> dict[str, Any]:
    """Return what a run depends on besides its configuration: versions, commit, hardware, seed, command."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["llm-train", *ExperimentParser.typed]),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _gpus(trainer),
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
    }


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    """Return the name of the processor and its instructions for vectors and matrices, on which speed depends."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{', AMX' * has_matrix_units(torch.device('cpu'))})"


def _gpus(trainer: L.Trainer) -> list[str]:
    """Return the names of the GPUs of the machine; asking for them on a CPU run would take memory on each."""
    if trainer.strategy.root_device.type != "cuda":
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # this project, in a checkout alone
            yield name, importlib.metadata.version(name)


def _commit() -> str | None:
    """Return the commit of the checkout that runs, or `None` for an installed package: one around it is of others."""
    root = names.SHIPPED.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
