"""A callback that times the steps of a run, and loops to compare it with, timed in the same way."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float:
    """Return the largest memory of tensors on the GPU since the last reset, in GiB; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def forget_peak() -> None:
    """Start to measure the memory of the GPU anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@dataclass
class Times:
    """Times of a run of optimiser steps.

    Args:
        every: Steps in a window; the figure is the median over windows.
        skipped: Windows at the start that are warm-up.
    """

    every: int
    skipped: int = 1
    began: float = field(default_factory=time.perf_counter)
    marks: list[float] = field(default_factory=list)
    first: float = float("nan")  # seconds to the end of the first step: compilation, allocation
    peak: float = 0.0

    def step(self, number: int) -> None:
        """Note the end of a step, from 1."""
        if number == 1:
            synchronize()
            self.first = time.perf_counter() - self.began
        if number % self.every == 0:
            synchronize()
            self.marks.append(time.perf_counter())
            self.peak = peak_gib()

    @property
    def seconds(self) -> float:
        """Median seconds of a step."""
        marks = self.marks[self.skipped :] if len(self.marks) > self.skipped + 1 else self.marks
        return statistics.median((b - a) / self.every for a, b in itertools.pairwise(marks))


class Clock(L.Callback):
    """Callback that times the optimiser steps of a run; the last run is `Clock.last`.

    Args:
        every: Steps in a window.
    """

    last: "Clock"
    times: Times
    trainer: L.Trainer
    module: Any

    def __init__(self, every: int = 10) -> None:
        self.every, self.graphs = every, []  # graphs compiled by the end of each validation, and of the run
        Clock.last = self

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.trainer, self.module = trainer, pl_module
        forget_peak()
        self.times = Times(self.every)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the end of a step."""
        self.times.step(trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the number of compiled graphs."""
        self.graphs.append(n_graphs())

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the number of compiled graphs."""
        self.graphs.append(n_graphs())


def n_graphs() -> int:
    """Return the number of graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def timed(step: Callable[[int], Any], n_steps: int, every: int) -> Times:
    """Time a loop over a function that makes a step."""
    forget_peak()
    times = Times(every)
    for number in range(n_steps):
        step(number)
        times.step(number + 1)
    return times
