"""The commands fit, validate, test and predict: a LightningCLI with linked arguments and a run folder."""

import ast
import contextlib
import functools
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ActionYesNo, Namespace
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.base import ExperimentDataModule
from experiments import names, trust
from experiments.errors import module_that_raised
from experiments.help.options import DEFAULTS
from experiments.parser import ExperimentParser, check_nulls, check_seed
from experiments.run import monitored, moved_runs, numbers, resume, run_folder
from experiments.run.run_folder import RunArguments, RunFolder
from experiments.run.run_record import RunRecord
from experiments.study.names import arm_of_agent, flag_value
from experiments.working_folder import importable
from experiments.yaml_files import load_yaml, read_yaml
from lightning_modules import optim
from lightning_modules.base import ExperimentModule
from lightning_modules.common import run_files
from lightning_modules.common.files import read_json
from lightning_modules.common.messages import say
from lightning_modules.common.signals import STOPS, exit_at_once
from lightning_modules.finetuning.bases import weights_follow
from lightning_modules.runtime import bfloat16
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.loggers import RunLogger, WandbRecorder
from lightning_modules.runtime.private_names import SettingsGoOverCheckpoint, leave_unused_gpus_alone

LINKED = ("vocab_size", "pad_token_id", "block_size", "classes")  # attributes of the data, arguments of a module
_LENGTH = ("max_steps", "max_epochs", "max_time")  # the arguments of the trainer that end a run
_GPUS = ("gpu", "cuda", "mps")  # names of accelerators
_LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote process exited|NCCL communicator")
_NOT_SERIALIZED = "Unable to serialize instance"  # jsonargparse's text in place of a value
_NOISE = (  # warnings of Lightning that do not hold here, or that a user cannot act on
    ".*your dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*treespec, LeafSpec.*",
    ".*LightningCLI`?'s args parameter is intended.*",
    ".*Total length of `list` across ranks is zero.*",  # no validation: the opening lines say so
    ".*was configured without a validation dataloader.*",
    ".*GPU available but not used.*",  # `trainer.accelerator: cpu` says so
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*when logging on epoch level in distributed setting to accumulate the metric across devices.*",
    rf"\s*{_NOT_SERIALIZED}",  # a default, which is left out of the configuration
)
_FINDERS = {  # callbacks that would replace a setting
    BatchSizeFinder: "data.batch_size is a setting of the experiment; set it",
    LearningRateFinder: "optimizer.lr is a setting of the experiment, with a schedule; compare several by "
    "`llm-train study`",
}
_LOADERS = {"test": "test_dataloader", "predict": "predict_dataloader"}  # what the commands read


class ExperimentCLI(SettingsGoOverCheckpoint):
    """Fits, validates, tests or predicts from YAML; ARCHITECTURE.md says how it differs from LightningCLI."""

    run: RunFolder | None = None
    has_begun = False  # whether a batch was read, or the run reached its end without one
    _lock: run_folder.Lock | None = None

    def __init__(self, args: Sequence[str]) -> None:
        self._args = list(args)
        self.closed = False  # whether the run's record is complete
        self.changes: resume.Changes = {}  # of a resumed run
        self.replaced: moved_runs.Original = {}  # arguments that the record of the run has as they were
        configured = {"default_config_files": [str(DEFAULTS)]}
        super().__init__(
            model_class=ExperimentModule,
            subclass_mode_model=True,
            datamodule_class=ExperimentDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            parser_class=ExperimentParser,
            parser_kwargs={"prog": "llm-train"}
            | {name: configured | {"prog": f"llm-train {name}"} for name in self.subcommands()},
            save_config_callback=RunRecord,
            save_config_kwargs={"cli": self},
            trainer_defaults={"enable_autolog_hparams": False},  # the run's record is the resolved YAML
            auto_configure_optimizers=False,  # LightningCLI's own builds the schedule before the length is known
            args=self._args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method there
        """Return the subcommands, or only the one that the command line names: each needs a parser of its own."""
        named = {name: skipped for name, skipped in super().subcommands().items() if name in self._args[:1]}
        return named or super().subcommands()

    def add_arguments_to_parser(self, parser: ExperimentParser) -> None:
        """Add `run:`, `optimizer:`, `lr_scheduler:`, `allow:` and `auto_resume:`, and link the data to the model."""
        parser.add_class_arguments(RunArguments, "run")
        optimizer = parser.add_argument(
            "--optimizer",
            type=optim.OptimizerFactory,
            default={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            help="Optimiser over the model's parameters; weight decay acts on matrices only.",
        )
        schedule = parser.add_argument(
            "--lr_scheduler",
            type=optim.ScheduleFactory | None,
            default={"class_path": "lightning_modules.optim.schedules.Constant", "init_args": {}},
            help="Learning-rate schedule, stepped every optimiser step and told the length of the run.",
        )
        for argument in (optimizer, schedule):  # also classes whose arguments have no types, as for models and data
            argument.sub_add_kwargs = {"fail_untyped": False}
        parser.add_argument(
            "--allow",
            type=str | None,
            help="Packages, separated by commas, whose classes the config.yaml of a run folder may name. Classes that "
            "a flag or another YAML names need no permission.",
        )
        if parser.prog == "llm-train fit":
            parser.add_argument(
                "--auto_resume",
                action=ActionYesNo,
                default=False,
                help="Resume the newest run of this name (in a study, the run of exactly this name), or start it if "
                "there is none; do nothing if it is finished. For schedulers that start a job again.",
            )
        parser.link_arguments("seed_everything", "data.init_args.seed")
        for name in LINKED:
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=_reader(name), apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:  # type: ignore[override]
        """Parse, and keep the command line for error messages."""
        ExperimentParser.command_line, ExperimentParser.folder = self._args, Path.cwd()
        super().parse_arguments(parser, args)

    @property
    def arguments(self) -> Namespace:
        """The parsed arguments of the subcommand."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and its run, and keep the linked arguments that the YAML sets."""
        trust.check_places(self.arguments, self._args)
        check_nulls(self.arguments)
        check_seed(self.arguments["seed_everything"])
        for line in dropped_defaults(self._trainer_arguments):
            say(line)
        arguments, model = self.arguments["run"], self.arguments["model"]
        if self._trainer_arguments.get("default_root_dir") is not None:
            raise MisconfigurationException("trainer.default_root_dir: leave it out, and set run.root and run.name")
        numbers.check(self._trainer_arguments, trains=self.subcommand == "fit")
        files = self.arguments["config"] or []
        name = arguments.name or arm_of_agent() or (Path(str(files[0])).stem if files else "unnamed")
        topic = arguments.topic or model.class_path.split(".")[-2]
        study = arguments.study or os.environ.get("WANDB_SWEEP_ID")
        for key, value in (("name", name), ("topic", topic), ("study", study)):
            if value is not None and (value in (".", "..") or Path(value).name != value):
                raise MisconfigurationException(f"run.{key}: {value!r} is not a name of a folder; leave out slashes")
        self._claim_as = (Path(arguments.root), topic, name, study)
        self._recorded = run_folder.of_config(Path(str(files[0])), arguments) if files else None
        self._given = {key: model.get("init_args", {}).get(key) for key in LINKED}
        self._resolve_checkpoint()
        self._lock_run()
        self._compare_with_the_run_to_resume()
        self._use_files_of_the_run()
        if "weights_only" in self.arguments:
            self.arguments["weights_only"] = True  # a checkpoint runs no code, whatever reads it
        if "verbose" in self.arguments:
            self.arguments["verbose"] = False  # Lightning's table of results; the closing lines have them

    def resolved(self, with_linked: bool = False) -> dict[str, Any]:
        """Return the arguments of the subcommand as plain values; they were validated when they were parsed.

        Args:
            with_linked: Whether arguments are in it that take their value from others.
        """
        parser = self.parser_of(self.subcommand)
        options = {"skip_unset": False, "skip_validation": True, "skip_link_targets": not with_linked}
        return _without_objects(load_yaml(parser.dump(self.arguments, **options)))

    @property
    def _trainer_arguments(self) -> Namespace:
        return self.arguments["trainer"]

    def _resolve_checkpoint(self) -> None:
        arguments = self.arguments
        given = arguments.get("ckpt_path")
        if arguments.get("auto_resume"):
            if given is not None:
                raise MisconfigurationException("auto_resume finds the checkpoint itself: leave ckpt_path out")
            arguments["ckpt_path"] = self._newest_checkpoint()
            return
        if given is None and self.subcommand == "predict":
            raise MisconfigurationException("predict needs weights. Give --ckpt_path best, last or a file")
        if given is None:
            if self.subcommand != "fit":
                say(
                    f"{self.subcommand} without --ckpt_path: the weights are those before training, random if the "
                    "model has no base; --ckpt_path best evaluates the trained model"
                )
            return
        run: RunFolder | None
        if given in ("last", "best"):
            run = self._recorded or run_folder.find(*self._claim_as, checkpoint=given)
            there = [checkpoint.stem for checkpoint in run_files.checkpoints_in(run.path)]
            advice = f"this run has the checkpoint {there[0]}" if there else "this run has saved no checkpoint"
            file = run.checkpoint(given)
        else:
            file, advice = Path(given), "give a file, `last` or `best`"
            if file.is_dir():
                raise MisconfigurationException(
                    f"ckpt_path: {file} is a folder; those of a run are in its checkpoints/: last.ckpt and best.ckpt"
                )
            run = run_folder.of_checkpoint(file)
        # A fit from another checkpoint than the last is a branch, and gets a folder of its own.
        if self.subcommand != "fit" or file.name == "last.ckpt":
            self.run = run
        if not file.is_file():
            raise MisconfigurationException(f"ckpt_path: {file} does not exist; {advice}")
        arguments["ckpt_path"] = str(file)
        if not any("AtomicCheckpointIO" in str(plugin) for plugin in self._trainer_arguments.get("plugins") or []):
            AtomicCheckpointIO().load_checkpoint(file, map_location="meta")  # refuse what Lightning would fail on

    def _compare_with_the_run_to_resume(self) -> None:
        """Find what a resumed run changes, and refuse what it cannot change, before anything is written."""
        checkpoint = self.arguments.get("ckpt_path")
        if self.subcommand == "fit" and checkpoint and (resumed := run_folder.of_checkpoint(Path(checkpoint))):
            self.changes = resume.changes(read_yaml(resumed.path / run_files.CONFIG), self.resolved())

    def _use_files_of_the_run(self) -> None:
        """Use the tokenizer and the architecture that a run has saved where the configuration leads to none."""
        checkpoint = Path(given) if (given := self.arguments.get("ckpt_path")) else None
        config = Path(str(files[0])) if (files := self.arguments["config"]) else None
        of_checkpoint = run_folder.of_checkpoint(checkpoint) if checkpoint else None
        recorded = config is not None and config.is_file() and run_folder.is_run(config.parent)
        folder = of_checkpoint.path if of_checkpoint else config.parent if config and recorded else None
        if folder is not None:
            self.replaced = moved_runs.use_own_files(self.arguments, folder, checkpoint)
        if config is not None and recorded:
            moved_runs.check_paths(self.arguments, config)

    def _newest_checkpoint(self) -> str | None:
        """Return the newest readable checkpoint of the named run, or `None`; exit if the run is finished."""
        self.run = self._recorded or run_folder.newest(*self._claim_as)
        if self.run is None:
            return None
        self._lock_run()
        if self._is_finished(self.run):
            say(f"{self.run.path} is finished: nothing is left to do")
            raise SystemExit
        damaged = []
        for checkpoint in filter(Path.is_file, map(self.run.checkpoint, ("last", "best"))):
            try:
                saved = AtomicCheckpointIO().load_checkpoint(checkpoint, map_location="meta")
            except MisconfigurationException as error:
                damaged.append(str(error))
            else:
                say("; ".join([*damaged, f"resuming from {checkpoint}, step {saved['global_step']}"]))
                return str(checkpoint)
        if damaged:
            raise MisconfigurationException(
                f"auto_resume: no checkpoint can be read ({'; '.join(damaged)}); another run.name starts a new run"
            )
        return None

    def _is_finished(self, run: RunFolder) -> bool:
        """Return whether a run is finished, and the command asks for the same length."""
        summary, config = run.path / run_files.SUMMARY, run.path / run_files.CONFIG
        if read_json(summary, {}).get("status") != "finished":
            return False
        saved = run_folder.recorded(config, "trainer")
        return all(saved.get(key) == self._trainer_arguments[key] for key in _LENGTH)

    def _lock_run(self) -> None:
        """Lock the folder that this run continues or starts, so that no other process trains in it."""
        if self.run is None or self._lock is not None:
            return
        if not self.run.is_new:
            run_folder.check_links(self.run.path)
            if not os.access(self.run.path, os.W_OK):
                raise MisconfigurationException(
                    f"{self.run.path} cannot be written to, and {self.subcommand} writes its results there: copy the "
                    "run to a folder of yours, and give the config.yaml of the copy"
                )
        if self.subcommand == "fit" and rank_zero_only.rank == 0:
            self._lock = run_folder.Lock(self.run.path)

    def instantiate_classes(self) -> None:
        """Build the model, the data and the trainer."""
        with weights_follow() if self.arguments.get("ckpt_path") else contextlib.nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with the run folder, once model and data are built and agree."""
        leave_unused_gpus_alone()
        self._check_links()
        self.model.data = self.datamodule
        self._check_has_data()
        if (kind := self._trainer_arguments["accelerator"]) in _GPUS and not torch.accelerator.is_available():
            raise MisconfigurationException(
                f"trainer.accelerator is {kind}, and PyTorch finds no GPU here: give -c trainer/cpu in its place"
            )
        if self._trainer_arguments.get("fast_dev_run"):
            self.run = run_folder.temporary(self._claim_as[1])
        elif self.run is None:
            self.run = run_folder.claim(*self._claim_as)
            if self.run.name != (name := self._claim_as[2]):
                say(f"{self.run.path.with_name(name)} exists; this run is {self.run.name}")
            self._lock_run()
        built = self.config_init[self.subcommand]
        callbacks = built["trainer"]["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        for finder, advice in _FINDERS.items():
            if any(isinstance(callback, finder) for callback in callbacks):
                raise MisconfigurationException(f"{finder.__name__}: {advice}")
        if built["trainer"]["enable_progress_bar"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        built["trainer"]["callbacks"] = last_of_defaults(callbacks)
        check_states(built["trainer"]["callbacks"])
        rank = rank_zero_only.rank  # of the processes that were started
        try:
            trainer = super().instantiate_trainer(default_root_dir=str(self.run.path), **kwargs)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not module_that_raised(error).startswith("lightning."):
                raise
            raise MisconfigurationException(f"trainer: {error}") from error
        if rank >= trainer.world_size:  # it would train a second time, without a record, in the folder of rank 0
            raise MisconfigurationException(
                f"trainer.devices: this is process {rank + 1} of those that torchrun or srun has started, and the run "
                f"has {trainer.world_size}: give trainer.devices of a machine and trainer.num_nodes, or start fewer"
            )
        if line := bfloat16.advice(trainer):
            say(line)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.attach(self.run.path, self.run.topic, self.run.name, self.subcommand, self.run.study)
        self.model.optimizer_factory, self.model.schedule_factory = built["optimizer"], built["lr_scheduler"]
        if self.subcommand == "fit":
            optim.check_optimizer(built["optimizer"])
            monitored.check(self.model, trainer.callbacks, built["lr_scheduler"])
        return trainer

    def _check_links(self) -> None:
        for name, given in self._given.items():
            actual = getattr(self.datamodule, name, None)
            if given is not None and given != actual:
                raise MisconfigurationException(
                    f"model.{name}: the YAML says {given}, but the data has {actual}; leave it out, it is linked"
                )

    def _check_has_data(self) -> None:
        """Refuse `test` and `predict` if neither the data nor the module has examples for it."""
        loader = _LOADERS.get(self.subcommand)
        if loader is None or any(is_overridden(loader, part) for part in (self.datamodule, self.model)):
            return
        command = self.model.next_command(shlex.quote(str(self.run.path)) if self.run else "RUN")
        advice = "" if command.startswith(f"llm-train {self.subcommand} ") else f"; use `{command}`"
        raise MisconfigurationException(
            f"{self.subcommand}: {type(self.datamodule).__name__} has no {loader}, and so nothing to {self.subcommand}"
            f"{advice}"
        )

    def say_that_it_was_a_trial(self) -> None:
        """Say what a run with `trainer.fast_dev_run` did, since it leaves nothing."""
        if n_batches := int(self._trainer_arguments.get("fast_dev_run") or 0):
            what = "1 batch" if n_batches == 1 else f"{n_batches} batches"
            say(f"trial run: {self.subcommand} works on {what} of each split; it kept no files")

    @property
    def leaves_nothing(self) -> bool:
        """Whether the run was refused, stopped or failed before its first batch, in a folder that it has made.

        The folder is removed, so that the next try has its name. In a study it stays as the record of a failed run, if
        it holds one, until the study tries again.
        """
        if self.run is None or not self.run.is_new or self.has_begun:
            return False
        if self.run.study is not None and any(self.run.path.glob("config*.yaml")):
            return False
        return run_folder.holds_only_a_start(self.run.path)

    def close(self) -> None:
        """End the run's W&B run if that goes on, remove the folder of a trial or of a run not begun, and unlock it."""
        try:
            self._leave()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _leave(self) -> None:
        trainer = getattr(self, "trainer", None)
        if self.has_begun and not self.closed:  # another callback failed, or a second Ctrl-C came, while the run ended
            error = sys.exception()
            cause = (error and error.__context__) or error or SystemExit()  # what the callbacks were called for
            for callback in getattr(trainer, "callbacks", ()):
                if isinstance(callback, RunRecord):
                    callback.on_exception(trainer, self.model, cause)
        for logger in getattr(trainer, "loggers", ()):  # `prepare` and `estimate` have another trainer
            if isinstance(logger, WandbRecorder):
                logger.finish(exit_code=1)  # W&B's process writes into the folder until then
        if self.run is None or not self.run.is_new:
            return
        is_trial = bool(self._trainer_arguments.get("fast_dev_run"))  # each process has a folder of its own
        if is_trial or (rank_zero_only.rank == 0 and self.leaves_nothing):
            shutil.rmtree(self.run.path, ignore_errors=True)


@functools.cache
def _default_trainer() -> dict[str, Any]:
    return read_yaml(DEFAULTS)["trainer"]


def dropped_defaults(trainer: Mapping[str, Any] | Namespace) -> Iterator[str]:
    """Yield a line for each list of callbacks, loggers or plugins that replaces the defaults and keeps none of them.

    Args:
        trainer: Parsed arguments of the trainer.
    """
    for key, defaults in _default_trainer().items():
        given = trainer.get(key)
        if not isinstance(defaults, list) or not given or given is True:
            continue
        dropped, kept = ([*_class_names(value)] for value in (defaults, given))
        if kept and not {*dropped} & {*kept}:
            yield (
                f"trainer.{key}: {', '.join(kept)} in place of the defaults, {', '.join(dropped)}; "
                f"`--trainer.{key}+`, or `{key}+:` in YAML, adds to them"
            )


def last_of_defaults(callbacks: Sequence[L.Callback]) -> list[L.Callback]:
    """Return the callbacks, each of a default class once: the last one, with its settings, in the place of the first.

    So `--trainer.callbacks+ RunCheckpoint` sets other arguments of a default callback, and does not add a second one.
    """
    defaults = {default["class_path"] for default in _default_trainer()["callbacks"]}
    chosen: dict[object, L.Callback] = {}
    for callback in callbacks:
        path = f"{type(callback).__module__}.{type(callback).__qualname__}"
        chosen[path if path in defaults else id(callback)] = callback
    return [*chosen.values()]


def check_states(callbacks: Sequence[L.Callback]) -> None:
    """Raise a `MisconfigurationException` if two callbacks would have one place in a checkpoint for their states."""
    keys = Counter(callback.state_key for callback in callbacks if is_overridden("state_dict", callback, L.Callback))
    for key, n in keys.items():
        if n > 1:
            raise MisconfigurationException(
                f"trainer.callbacks: there are {n} of {key}, and a checkpoint keeps the state of one; leave one of them"
            )


def _without_objects(value: Any) -> Any:
    """Return settings without those that YAML cannot hold, such as a default that is a `torch.device`.

    They are defaults, because a file or a flag gives none, and so they are the same where they are left out.
    """
    if isinstance(value, dict):
        objects = {key for key, item in value.items() if isinstance(item, str) and item.startswith(_NOT_SERIALIZED)}
        return {key: _without_objects(item) for key, item in value.items() if key not in objects}
    return [_without_objects(item) for item in value] if isinstance(value, list) else value


def _class_names(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        path = item.get("class_path") if isinstance(item, Mapping | Namespace) else item
        if isinstance(path, str):
            yield path.rpartition(".")[2]


def _reader(attribute: str) -> Callable[[ExperimentDataModule], Any]:
    return lambda datamodule: getattr(datamodule, attribute, None)


def _with_nulls(flag: str) -> str:
    """Return a flag of `wandb agent` with null in place of None; it writes settings as Python does."""
    name, equals, value = flag.partition("=")
    with contextlib.suppress(ValueError, SyntaxError):
        if equals and (value == "None" or value.startswith(("[", "{"))):
            return f"{name}={flag_value(ast.literal_eval(value))}"
    return flag


@contextlib.contextmanager
def _exiting_on_signals() -> Iterator[None]:
    """Exit on signals to stop that would end the process at once, so that a run not begun leaves nothing.

    `GracefulStop` replaces this when the trainer is set up, which is after the data is prepared.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    deadly = [number for number in STOPS if in_main_thread and signal.getsignal(number) is signal.SIG_DFL]
    for number in deadly:
        signal.signal(number, exit_at_once)
    try:
        yield
    finally:
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)


def main(args: Sequence[str], kind: type[ExperimentCLI] = ExperimentCLI) -> None:
    """Run the subcommand that the command line begins with, by this class or a kind of it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # the report that the user asks for
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    ExperimentParser.typed = list(args)
    if arm_of_agent():
        args = [_with_nulls(arg) for arg in args]
    args = names.with_files(args)
    cli = kind.__new__(kind)  # LightningCLI runs in its constructor, which may raise
    with _exiting_on_signals():
        _run(cli, args)


def _run(cli: ExperimentCLI, args: Sequence[str]) -> None:
    try:
        with trust.trusted(args) as named, importable(named):
            cli.__init__(args)  # type: ignore[misc]
        cli.say_that_it_was_a_trial()
    except RuntimeError as error:
        if _LOST_PEER.search(str(error)):
            raise MisconfigurationException(
                "another process of this job ended, and this one cannot continue without it; its output says why. "
                "With --auto_resume the same command continues from the last checkpoint"
            ) from error
        raise
    finally:
        cli.close()
