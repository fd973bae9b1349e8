"""The real command in copies of this process, which import nothing and can be killed, alone or as ranks of a job."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from experiments.__main__ import main
from lightning_modules.runtime.checkpoint import RunCheckpoint

ROOT = Path(__file__).parents[1]
_ON_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=2")
TWO_PROCESSES = ("-c", str(ROOT / "experiments/trainer/ddp.yaml"), *_ON_CPU)
SHARDED = ("-c", str(ROOT / "experiments/trainer/fsdp.yaml"), *_ON_CPU, "--trainer.precision=32-true")
_LONGEST = 240  # seconds of one copy

Commands = Sequence[Sequence[str | Path]]


def start(
    *args: str | Path, prepare: Callable[[], None] = bool, output: Path | None = None, then: Commands = ()
) -> multiprocessing.Process:
    """Start the command in a copy of this process.

    Args:
        *args: Command line.
        prepare: Called in the copy before the command.
        output: File for what the copy prints.
        then: Further command lines, which the copy runs after the first, also if the first was stopped.
    """

    def child() -> None:
        if "PYTEST_CURRENT_TEST" in os.environ:  # a copy that hangs says where, and ends
            faulthandler.dump_traceback_later(_LONGEST, exit=True, file=sys.__stderr__)
        # tqdm's lock is one semaphore for a process and its copies: a copy killed while it draws would keep it.
        tqdm.set_lock(threading.RLock())
        # The copy handles signals as a process that a user starts, also where the tests run in the background.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if output is not None:
            sys.stdout = sys.stderr = output.open("a", buffering=1)
        prepare()
        for number, command in enumerate([args, *then]):
            try:
                main([str(arg) for arg in command])
            except SystemExit:
                if number == len(then):
                    raise

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


class StudyProcess:
    """The process of a run of a study as a copy of this process, in place of a `subprocess.Popen`.

    Args:
        words: The run's command, which starts with `env python -m experiments`.
        stdout: File for what it prints.
        **_: Not used: a copy holds the lock anyway.
    """

    def __init__(self, words: list[str], *, stdout: BinaryIO, **_: object) -> None:
        assert words[:4] == ["/usr/bin/env", sys.executable, "-m", "experiments"]
        self.process = start(*words[4:], output=Path(stdout.name))

    def poll(self) -> int | None:
        """Return the exit code; `None` while the process is alive."""
        return self.process.exitcode


def start_ranks(
    n: int, *args: str | Path, prepare: Callable[[int], None] = bool, output: Path | None = None, then: Commands = ()
) -> list[multiprocessing.Process]:
    """Start the ranks of a job, each in the environment that torchrun sets.

    Args:
        n: Number of ranks.
        *args: Command line.
        prepare: Called in each rank with its number before the command.
        output: File for what the ranks print.
        then: Further command lines for the same job.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def become(rank: int) -> None:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "forked",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(n),
            "LOCAL_WORLD_SIZE": str(n),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
        }
        rank_zero_only.rank = rank  # Lightning has looked it up when it was imported
        prepare(rank)

    return [start(*args, prepare=lambda rank=rank: become(rank), output=output, then=then) for rank in range(n)]


def wait(processes: list[multiprocessing.Process], seconds: float = 120) -> list[int]:
    """Return the exit codes of processes, negative for a signal; kill a process that does not end in time."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def die_after_step(step: int | None) -> None:
    """For `prepare`: the process kills itself when `last.ckpt` of a step, or the first one, has been written."""
    save = RunCheckpoint._save

    def save_and_die(self: RunCheckpoint, trainer: object, *names: str) -> None:
        save(self, trainer, *names)
        if "last" in names and step in (None, trainer.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    RunCheckpoint._save = save_and_die


def signal_after_step(step: int, signal_number: int = signal.SIGKILL, group: bool = False) -> None:
    """For `prepare`: the process sends itself a signal after an optimiser step, before a validation or checkpoint.

    Args:
        step: The optimiser step.
        signal_number: The signal.
        group: Whether the signal goes to a process group of its own, and so to the loader's workers too.
    """
    if group:
        os.setpgid(0, 0)
    end, sent = RunCheckpoint.on_train_batch_end, []

    def end_and_send(self: RunCheckpoint, trainer: object, *args: object) -> None:
        end(self, trainer, *args)
        if trainer.global_step == step and not sent:
            sent.append(step)
            os.kill(0 if group else os.getpid(), signal_number)

    RunCheckpoint.on_train_batch_end = end_and_send
