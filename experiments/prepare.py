"""`llm-train prepare`: fetch and tokenise what an experiment reads, ahead of its runs."""

import os
import shlex
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from experiments import names
from experiments.errors import CommandParser, count

if TYPE_CHECKING:  # imported where they are used: the help answers without them
    from datamodules.base import ExperimentDataModule


def main(args: Sequence[str]) -> None:
    """Prepare the data of an experiment, and fetch the weights that its model begins with.

    Args:
        args: Command line, `prepare` first.
    """
    parser = CommandParser(
        prog="llm-train prepare",
        usage="llm-train prepare -c NAME [-c FILE ...] [--KEY VALUE ...] [--processes N]",
        description="Fetch and tokenise what an experiment reads, with the files and flags of `llm-train fit`. What is "
        "there already is used; so after an error the same command continues. Several calls, also on machines that "
        "share the cache, divide the parts of a large text among them.",
    )
    parser.add_argument(
        "--processes",
        type=count,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that tokenise the parts of a large text (default: one for each core)",
    )
    options, rest = parser.parse_known_args(args[1:])
    names.with_files(["prepare", *rest])  # whose errors name this command

    from experiments import cli

    class Preparation(cli.ExperimentCLI):
        """The command `fit` up to its data: no run begins."""

        def instantiate_trainer(self, **_: Any) -> Any:
            """Return what prepares the data in place of training."""
            return SimpleNamespace(fit=lambda model, datamodule, **_: prepare(datamodule, options.processes))

    cli.main(["fit", *rest], Preparation)
    print(f"next    llm-train fit {shlex.join(rest)}")


def prepare(data: "ExperimentDataModule", n_processes: int) -> None:
    """Prepare the data of a run and check them, as a run does at its beginning.

    Args:
        data: Datamodule of the run.
        n_processes: Processes that tokenise a large text.
    """
    from lightning.pytorch import LightningDataModule

    from lightning_modules.common.messages import say

    data.n_processes = n_processes
    if type(data).prepare_data is LightningDataModule.prepare_data:
        say(f"{type(data).__name__} reads its data when a run begins: there is nothing to prepare")
    data.prepare_data()
    data.setup("fit")
