"""Work of one process for which the others wait."""

import multiprocessing
import time
from datetime import timedelta
from types import SimpleNamespace

import forks
import torch

from lightning_modules.runtime.processes import from_first

TIMEOUT = 0.4  # seconds, of the operations of the run's own process group


def test_processes_wait_for_the_work_of_the_first_longer_than_for_an_operation(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, values = context.Barrier(2), context.SimpleQueue()

    def work() -> str:
        time.sleep(1.5 * TIMEOUT)
        return "a value"

    def take_part(rank: int) -> None:
        ready.wait()
        torch.distributed.init_process_group(
            "gloo", f"file://{tmp_path}/store", timedelta(seconds=TIMEOUT), world_size=2, rank=rank
        )
        values.put(from_first(SimpleNamespace(world_size=2, is_global_zero=rank == 0), work))

    processes = [context.Process(target=take_part, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    assert forks.wait(processes, 30) == [0, 0]
    assert [values.get(), values.get()] == ["a value", "a value"]
