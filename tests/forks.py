"""The real command in copies of this process: they need no imports, and can be killed, alone or as ranks of a job."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from experiments.__main__ import main
from lightning_modules.runtime.checkpoint import RunCheckpoint

ROOT = Path(__file__).parents[1]
_ON_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=2")
TWO_PROCESSES = ("-c", str(ROOT / "experiments/trainer/ddp.yaml"), *_ON_CPU)
SHARDED = ("-c", str(ROOT / "experiments/trainer/fsdp.yaml"), *_ON_CPU, "--trainer.precision=32-true")


def start(*args: str | Path, prepare: Callable[[], None] = bool, output: Path | None = None) -> multiprocessing.Process:
    """Starts the command in a copy of this process; what it prints goes into a file if one is named."""

    def child() -> None:
        # tqdm's lock is one semaphore for a process and its copies: a copy killed while it draws would keep it.
        tqdm.set_lock(threading.RLock())
        if output is not None:
            sys.stdout = sys.stderr = output.open("a", buffering=1)
        prepare()
        main([str(arg) for arg in args])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def start_ranks(
    n: int, *args: str | Path, prepare: Callable[[int], None] = bool, output: Path | None = None
) -> list[multiprocessing.Process]:
    """Starts the ranks of a job, each in the environment that torchrun gives it."""
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
        rank_zero_only.rank = rank  # which Lightning has looked up when it was imported
        prepare(rank)

    return [start(*args, prepare=lambda rank=rank: become(rank), output=output) for rank in range(n)]


def start_anew(*args: str | Path) -> subprocess.Popen:
    """Starts the command in a process that imports all anew: as ddp, by its command line, starts further ones."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "experiments", *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait(processes: list[multiprocessing.Process], seconds: float = 120) -> list[int]:
    """The exit codes of processes, negative for a signal; one that does not end in time is killed."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def die_after_step(step: int) -> None:
    """For `prepare`: the process kills itself when it has seen `last.ckpt` of that step written."""
    save = RunCheckpoint._save

    def save_and_die(self: RunCheckpoint, trainer: object, name: str) -> None:
        save(self, trainer, name)
        if name == "last" and trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RunCheckpoint._save = save_and_die
