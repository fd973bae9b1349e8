"""ExperimentCLI: LightningCLI with the house's links, run folder and errors."""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ActionYesNo
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.base import ExperimentDataModule
from experiments import run_folder
from experiments.parser import ExperimentParser
from experiments.run_folder import RunArguments, RunFolder
from experiments.run_record import RunRecord
from experiments.study import sweep_file
from lightning_modules import optim
from lightning_modules.base import ExperimentModule
from lightning_modules.common.messages import say
from lightning_modules.runtime.checkpoint_io import AtomicCheckpointIO
from lightning_modules.runtime.loggers import RunLogger

LINKED = ("vocab_size", "pad_token_id", "block_size", "classes")  # what a module must know of its data
DEFAULTS = Path(__file__).parent / "trainer" / "defaults.yaml"
_LENGTH = ("max_steps", "max_epochs", "max_time")  # of a run: what decides when it is finished
_LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote process exited|NCCL communicator")
_NOISE = (  # warnings of Lightning's that are not true here, or that nobody can act on
    ".*your dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*treespec, LeafSpec.*",
    ".*`LightningCLI`'s args parameter is intended.*|.*LightningCLI's args parameter is intended.*",
    ".*was configured without a validation dataloader.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*when logging on epoch level in distributed setting to accumulate the metric across devices.*",
)


class ExperimentCLI(LightningCLI):
    """Fit, validate, test and predict from YAML; see ARCHITECTURE.md for what it adds to LightningCLI.

    Args:
        args: Command line, without the program's name.
    """

    run: RunFolder | None = None

    def __init__(self, args: Sequence[str]) -> None:
        self.closed = False  # whether the run's record is complete
        super().__init__(
            model_class=ExperimentModule,
            subclass_mode_model=True,
            datamodule_class=ExperimentDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            parser_class=ExperimentParser,
            parser_kwargs={"prog": "llm-train"}
            | {
                command: {"default_config_files": [str(DEFAULTS)], "prog": f"llm-train {command}"}
                for command in self.subcommands()
            },
            save_config_callback=RunRecord,
            save_config_kwargs={"cli": self},
            trainer_defaults={"enable_autolog_hparams": False},  # the run's record is the resolved YAML
            auto_configure_optimizers=False,  # LightningCLI's own builds the schedule before the length is known
            args=list(args),
        )

    def add_arguments_to_parser(self, parser: ExperimentParser) -> None:
        """Adds `run:`, `optimizer:`, `lr_scheduler:` and `auto_resume:`, and links the data to the model.

        Args:
            parser: Parser of one subcommand.
        """
        parser.add_class_arguments(RunArguments, "run")
        parser.add_argument(
            "--optimizer",
            type=optim.OptimizerFactory,
            default={"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            help="Optimiser over the model's parameters; weight decay acts on matrices only.",
        )
        parser.add_argument(
            "--lr_scheduler",
            type=optim.ScheduleFactory | None,
            default={"class_path": "lightning_modules.optim.schedules.Constant", "init_args": {}},
            help="Learning-rate schedule, stepped every optimiser step and told the length of the run.",
        )
        if parser.prog == "llm-train fit":
            parser.add_argument(
                "--auto_resume",
                action=ActionYesNo,
                default=False,
                help="Go on with the newest run of this name where it stopped, or start it if there is none. "
                "Nothing is done if it is finished. What a scheduler that starts jobs again wants.",
            )
        parser.link_arguments("seed_everything", "data.init_args.seed")
        for name in LINKED:
            parser.link_arguments("data", f"model.init_args.{name}", compute_fn=_reader(name), apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Stock: a checkpoint's hyper-parameters silently override the YAML and the flags. Here they do not."""

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint and the run that are meant, and keeps what the links are about to replace."""
        arguments = self._get(self.config, "run")
        if self._get(self.config, "trainer").get("default_root_dir") is not None:
            raise MisconfigurationException("trainer.default_root_dir: the run folder is it; set run.root and run.name")
        model = self._get(self.config, "model")
        topic = arguments.topic or model.class_path.split(".")[-2]
        name = arguments.name or sweep_file.arm_of_agent() or self._name_from_config() or "unnamed"
        study = arguments.study or os.environ.get("WANDB_SWEEP_ID")
        self._claim_as = (Path(arguments.root), topic, name, study)
        self._given = {key: model.get("init_args", {}).get(key) for key in LINKED}
        self._resolve_checkpoint()
        if "verbose" in self.config[self.subcommand]:
            self.config[self.subcommand]["verbose"] = False  # Lightning's table: the closing lines say the same

    def _name_from_config(self) -> str | None:
        files = self._get(self.config, "config") or []
        return Path(str(files[0])).stem if files else None

    def _resolve_checkpoint(self) -> None:
        arguments = self.config[self.subcommand]
        given = arguments.get("ckpt_path")
        if arguments.get("auto_resume"):
            if given is not None:
                raise MisconfigurationException("auto_resume finds the checkpoint itself: leave ckpt_path out")
            arguments["ckpt_path"] = self._where_it_stopped()
            return
        if given is None and self.subcommand == "predict":
            raise MisconfigurationException("predict: with which weights? Give --ckpt_path best, last or a file")
        if given is None:
            return
        if given in ("last", "best"):
            self.run = run_folder.find(*self._claim_as)
            given = self.run.checkpoint(given)
            if not given.is_file():
                raise MisconfigurationException(f"ckpt_path: {given} does not exist; this run has saved no checkpoint")
        else:
            given = Path(given)
            if not given.is_file():
                raise MisconfigurationException(f"ckpt_path: {given} does not exist; give a file, `last` or `best`")
            found = run_folder.of_checkpoint(given)
            # A fit from any other file than the last checkpoint is a branch, and gets a folder of its own.
            if found is not None and (self.subcommand != "fit" or given.name == "last.ckpt"):
                self.run = found
        arguments["ckpt_path"] = str(given)

    def _where_it_stopped(self) -> str | None:
        """The newest readable checkpoint of the named run; none where it has yet to start, or to save one.

        Raises:
            SystemExit: If the run is finished.
            MisconfigurationException: If it has checkpoints and none can be read.
        """
        self.run = run_folder.newest(*self._claim_as)
        if self.run is None:
            return None
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
                say("; ".join([*damaged, f"going on from {checkpoint}, step {saved['global_step']}"]))
                return str(checkpoint)
        if damaged:
            raise MisconfigurationException(
                f"auto_resume: no checkpoint can be read ({'; '.join(damaged)}); another run.name starts again"
            )
        return None

    def _is_finished(self, run: RunFolder) -> bool:
        """Whether a run came to its end, and is not to be longer now."""
        summary, config = run.path / "summary.json", run.path / run_folder.CONFIG
        if not summary.is_file() or json.loads(summary.read_text())["status"] != "finished":
            return False
        was, wanted = yaml.safe_load(config.read_text())["trainer"], self._get(self.config, "trainer")
        return all(was[key] == wanted[key] for key in _LENGTH)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds the trainer in the run's folder, now that everything else could be built.

        Raises:
            MisconfigurationException: If a linked value was given in YAML and is another than the data's, or there can
                be no such trainer.
        """
        self._check_links()
        if self._is_trial:
            self.run = run_folder.temporary(self._claim_as[1])
        elif self.run is None:
            self.run = run_folder.claim(*self._claim_as)
        try:
            trainer = super().instantiate_trainer(default_root_dir=str(self.run.path), **kwargs)
        except ValueError as error:
            raise MisconfigurationException(f"trainer: {error}") from error
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.attach(self.run.path, self.run.topic, self.run.name, self.subcommand, self.run.study)
        self.model.data = self.datamodule
        self.model.optimizer_factory = self._get(self.config_init, "optimizer")
        self.model.schedule_factory = self._get(self.config_init, "lr_scheduler")
        return trainer

    @property
    def _is_trial(self) -> bool:
        return bool(self._get(self.config, "trainer").get("fast_dev_run"))

    def _check_links(self) -> None:
        for name, given in self._given.items():
            actual = getattr(self.datamodule, name, None)
            if given is not None and given != actual:
                raise MisconfigurationException(
                    f"model.{name}: the YAML says {given}, but the data has {actual}; leave it out, it is linked"
                )

    def leave_nothing_useless(self) -> None:
        """Removes the folder of a trial run, or of a run that failed before it wrote anything."""
        if self.run is None or not self.run.is_new or rank_zero_only.rank != 0:
            return
        if self._is_trial:
            shutil.rmtree(self.run.path, ignore_errors=True)
        elif self.run.path.is_dir() and not any(self.run.path.iterdir()):
            self.run.path.rmdir()


def _reader(attribute: str) -> Callable[[ExperimentDataModule], Any]:
    return lambda datamodule: getattr(datamodule, attribute, None)


def main(args: Sequence[str]) -> None:
    """Runs one of LightningCLI's subcommands.

    Args:
        args: Command line, the subcommand first.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    cli = ExperimentCLI.__new__(ExperimentCLI)  # LightningCLI runs in its constructor; what it made must be tidied up
    try:
        cli.__init__(args)
    except RuntimeError as error:
        if _LOST_PEER.search(str(error)):
            raise MisconfigurationException(
                "another process of this job ended, and this one cannot go on without it; the other one's output says "
                "why. With --auto_resume the same command goes on from the last checkpoint"
            ) from error
        raise
    finally:
        cli.leave_nothing_useless()
