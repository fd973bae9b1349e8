"""Launchers, which start the runs of a study; this one starts them as processes of this machine."""

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Sequence
from subprocess import DEVNULL, STDOUT, Popen
from typing import BinaryIO, Protocol

from experiments.errors import UserError
from experiments.study.gpus import gpus_of, visible_gpus
from experiments.study.runs import Attempt, Plan, trainer_settings
from lightning_modules.common.messages import say


class Launcher(Protocol):
    """Starts the runs of a study, and finds those that an earlier command has started.

    Attributes:
        at_once: Largest number of runs that have been started and have not ended.
        pause: Time between two looks at the runs, in seconds.
    """

    at_once: int
    pause: float

    def left_alone(self) -> str | None:
        """Return what a study prints that is stopped while its runs go on, or `None` if the runs stop with it."""

    def start(self, runs: Sequence[Attempt], lock: BinaryIO) -> None:
        """Start runs: set the `job` of each."""

    def find(self, run: Attempt) -> bool:
        """Set the `job` of a run that an earlier command has submitted, and return whether it waits or is alive."""


class LocalJob:
    """A run as a process of this machine, which leads a process group of its own.

    Args:
        process: The process.
    """

    def __init__(self, process: Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; `None` while the process is alive."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Send the process a signal; SIGKILL also to those that it has started, which it can no longer end."""
        if number != signal.SIGKILL:
            self._process.send_signal(number)
        elif self._process.returncode is None:  # otherwise another group can have its number
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class LocalLauncher:
    """Starts runs as processes of this machine, each on GPUs of its own if there are several jobs."""

    pause = 0.05

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.at_once = plan.jobs
        self._gpus = visible_gpus() if plan.jobs > 1 else []  # a single job has them all
        self._in_use: list[tuple[Attempt, list[str]]] = []
        self._has_said_so = False  # that runs share a GPU

    def start(self, runs: Sequence[Attempt], lock: BinaryIO) -> None:
        """Start the process of each run, which resumes from a checkpoint if there is one.

        A process holds the study's lock too, so that the folder stays locked as long as a run lives.
        """
        for run in runs:
            words = [*run.command, *([f"--ckpt_path={run.last_checkpoint}"] if run.has_checkpoint else [])]
            changes = run.environment()
            if gpus := self._choose_gpus(run, words):
                changes["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            if self._plan.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
                changes["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self._plan.jobs))
            run.prepare()
            with run.log.open("ab") as output:
                process = Popen(
                    words,
                    env={name: value for name, value in (os.environ | changes).items() if value is not None},
                    stdin=DEVNULL,
                    stdout=output,
                    stderr=STDOUT,
                    process_group=0,  # Ctrl-C reaches the study alone, which signals each run once
                    pass_fds=[lock.fileno()],
                )
            run.job = LocalJob(process)

    def left_alone(self) -> None:
        """Return `None`: the runs stop with the study."""

    def find(self, run: Attempt) -> bool:
        """Refuse a run that another launcher has submitted: it may still be alive."""
        raise UserError(f"{run.folder} was submitted to SLURM; use --launcher slurm again")

    def _choose_gpus(self, run: Attempt, words: Sequence[str]) -> list[str]:
        """Return the GPUs for a run, those with the fewest runs on them; none if it is to see them all."""
        if not self._gpus:
            return []
        wanted = gpus_of(trainer_settings(self._plan.sweep, words), max(1, len(self._gpus) // self._plan.jobs))
        if wanted > len(self._gpus):
            raise UserError(f"{run.arm} asks for {wanted} devices, and there are {len(self._gpus)} GPUs")
        self._in_use = [(other, gpus) for other, gpus in self._in_use if other.exit_code() is None]
        runs_on = Counter(gpu for _, gpus in self._in_use for gpu in gpus)
        chosen = sorted(self._gpus, key=runs_on.__getitem__)[:wanted]
        if any(runs_on[gpu] for gpu in chosen) and not self._has_said_so:
            say(f"gpus    {self._plan.jobs} jobs share {len(self._gpus)} GPUs")
            self._has_said_so = True
        self._in_use.append((run, chosen))
        return chosen
