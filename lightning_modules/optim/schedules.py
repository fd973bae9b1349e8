"""Learning-rate schedules that step with the optimiser and depend on the number of steps of the run.

Each schedule multiplies the learning rate of the optimiser (`optimizer: lr`, the peak). After a linear warm-up it
follows a curve over the rest of the run, along which `progress` increases from 0 to 1:

| schedule             | multiplier after the warm-up                                       |
|----------------------|--------------------------------------------------------------------|
| `Constant`           | 1                                                                  |
| `Linear`             | a straight line from 1 to `final`; to 0, the best end of a run     |
|                      | that Bergsma et al. (2025) found                                   |
| `Cosine`             | half a cosine from 1 to `final` (Loshchilov and Hutter, 2017)      |
| `InverseTime`        | 1 / (1 + `decay` * steps since warm-up) (Robbins and Monro, 1951)  |
| `WarmupStableDecay`  | 1, then a decay over the last part (Hu et al., 2024)               |
| `OneCycle`           | a cosine down to `final`, after a cosine warm-up (Smith, 2018)     |
| `ReduceOnPlateau`    | multiplied by `factor` when a validation metric stops improving    |

`InSequence` and `Together` combine schedules of PyTorch; its own classes for that take schedules that are built.

A run that is resumed with another length keeps the rate that it has: see `StepSchedule.load_state_dict`.

Papers: Loshchilov and Hutter, "SGDR" (2017), https://arxiv.org/abs/1608.03983; Robbins and Monro, "A Stochastic
Approximation Method" (1951); Smith and Topin, "Super-Convergence" (2018), https://arxiv.org/abs/1708.07120; Hu et al.,
"MiniCPM" (2024), https://arxiv.org/abs/2404.06395; Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond
Fixed Training Durations" (2024), https://arxiv.org/abs/2405.18392; Bergsma et al., "Straight to Zero" (2025),
https://arxiv.org/abs/2502.15938.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

from lightning_modules.common.ranges import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt
from lightning_modules.runtime.private_names import built_class


@dataclass(eq=False, repr=False)
class StepSchedule(LRScheduler):
    """Base of the schedules: the warm-up, and the multiplier of the learning rate.

    Args:
        optimizer: Filled in by the framework.
        total_steps: Number of optimiser steps of the whole run; filled in by the framework.
        warmup: Steps of linear warm-up: a share of the run below 1, a number of steps from 1 on.
    """

    optimizer: Optimizer
    total_steps: int
    warmup: NonNegativeFloat = 0.0
    needs_length = False  # whether the multiplier after the warm-up depends on the length of the run

    def __post_init__(self) -> None:
        self.stretches: list[tuple[int, float, int]] = []  # of resumed runs: step, its place, and the new length
        self.change_of_length = ""  # what `load_state_dict` did, in words
        self._set_length(self.total_steps)
        super().__init__(self.optimizer)

    def _set_length(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.warmup_steps = round(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)

    @property
    def planned_steps(self) -> int:
        """Number of optimiser steps of the whole run, also after a change of it."""
        return self.stretches[-1][2] if self.stretches else self.total_steps

    def multiplier(self, step: float) -> float:
        """Return the learning rate of a step, counted from 0, as a share of the peak."""
        step = self._place(step)
        if step < self.warmup_steps:
            return self.warm(step / self.warmup_steps, 1 / self.warmup_steps)
        rest = max(1, self.total_steps - self.warmup_steps)
        return self.after_warmup(min(1.0, (step - self.warmup_steps) / rest))

    def _place(self, step: float) -> float:
        """Return the step of the schedule of `total_steps` whose rate a step has: another one if it was stretched."""
        for start, place, length in reversed(self.stretches):
            if step >= start:
                share = (step - start) / max(1, length - start)  # exactly 1 at the end
                return place + share * (self.total_steps - place)
        return step

    def warm(self, progress: float, step: float) -> float:
        """Return the multiplier in the warm-up; it is not 0 at the first step, so that this step learns too.

        Args:
            progress: Completed part of the warm-up, from 0 to 1.
            step: Part of the warm-up that one step is.
        """
        return min(1.0, progress + step)  # a stretched warm-up has places less than a step before its end

    def after_warmup(self, progress: float) -> float:
        """Return the multiplier after the warm-up, along which `progress` increases from 0 to 1."""
        raise NotImplementedError

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Adapt to the metrics of a validation, by name; most schedules ignore them."""

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group."""
        multiplier = self.multiplier(self.last_epoch)
        return [base_lr * multiplier for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule, and the arguments that it is compared with when the run is resumed."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "optimizer"}
        state = super().state_dict()
        state = {key: value for key, value in state.items() if key not in arguments and key != "change_of_length"}
        return state | {"schedule": type(self).__name__, "arguments": arguments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint with the arguments of this schedule and the learning rates of its optimiser.

        If the length of the run has changed, the schedule of the new length is followed if it has the same rate at this
        step, as one that is still flat has. Otherwise the rest of the old schedule is stretched or compressed to the
        steps that are left, so that the rate does not jump. If the class or another argument has changed, the new
        schedule is followed from this step on.
        """
        new = self.state_dict()
        arguments = dict(state_dict.get("arguments", new["arguments"]))  # earlier versions saved none
        saved_length = arguments.pop("total_steps")
        own = {name: value for name, value in new["arguments"].items() if name != "total_steps"}
        if state_dict.get("schedule", new["schedule"]) == new["schedule"] and arguments == own:
            not_kept = ("base_lrs", "warmup_steps", "schedule", "arguments")
            kept = [key for key in new if key in state_dict and key not in not_kept]
            self.__dict__.update({key: state_dict[key] for key in kept})
            self._change_length(saved_length, new["arguments"]["total_steps"])
            if "arguments" not in state_dict:
                self._compare_rates(state_dict)
        else:
            self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._set_rates()

    def _set_rates(self) -> None:
        """Give the groups of the optimiser the rates of the next step."""
        self._last_lr = self.get_lr()
        for group, base_lr, lr in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group |= {"initial_lr": base_lr, "lr": lr}

    def _compare_rates(self, state_dict: dict[str, Any]) -> None:
        """Note a jump of the rate: earlier versions saved the rate, but not the length of the run."""
        saved, peaks = state_dict.get("_last_lr") or [], state_dict.get("base_lrs") or []
        if not saved or not peaks or not peaks[0]:
            return
        before, now = saved[0] / peaks[0], self.multiplier(self.last_epoch)
        if not math.isclose(before, now, rel_tol=1e-6, abs_tol=1e-12):
            self.change_of_length = (
                f"the rate is {now:.3g} of its peak in place of {before:.3g}: the checkpoint is of an earlier version, "
                "whose length is not known"
            )

    def _change_length(self, saved: int, planned: int) -> None:
        """Go on to `planned` steps with a schedule of `saved` steps."""
        step, rate_of_new = self.last_epoch, self.multiplier(self.last_epoch)
        self._set_length(saved)
        before = self.planned_steps
        if planned == before or planned <= step:
            return
        if not self.stretches and self.multiplier(step) == rate_of_new:
            self._set_length(planned)
            if _needs_length(self):
                self.change_of_length = f"the schedule is that of {planned} steps in place of {before}"
        else:
            self.stretches = [*self.stretches, (step, self._place(step), planned)]
            what = "stretched" if planned > before else "compressed"
            self.change_of_length = f"the rest of the schedule of {before} steps is {what} to end at step {planned}"


class Constant(StepSchedule):
    """Schedule that keeps the peak rate after the warm-up."""

    def after_warmup(self, progress: float) -> float:
        """Return 1."""
        return 1.0


@dataclass(eq=False, repr=False)
class Decay(StepSchedule):
    """Base of the schedules that decay to a final rate.

    Args:
        final: Rate at the end, as a share of the peak (0 to 1).
    """

    final: ClosedUnitInterval = 0.0
    needs_length = True


class Linear(Decay):
    """Schedule that decays along a straight line; to zero by default (Bergsma et al., 2025)."""

    def after_warmup(self, progress: float) -> float:
        """Decay from 1 to `final`."""
        return 1.0 + (self.final - 1.0) * progress


class Cosine(Decay):
    """Schedule that decays along half a cosine (Loshchilov and Hutter, 2017, without restarts)."""

    def after_warmup(self, progress: float) -> float:
        """Decay from 1 to `final`."""
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(eq=False, repr=False)
class InverseTime(StepSchedule):
    """Schedule that decays as 1 / (1 + decay t), t steps after the warm-up; independent of the length of the run.

    Args:
        decay: Increase of 1 / rate in each step, as a share of 1 / peak (0 or more).
    """

    decay: NonNegativeFloat = 1e-8

    def multiplier(self, step: float) -> float:
        """Return the learning rate of a step as a share of the peak."""
        if self._place(step) < self.warmup_steps:
            return super().multiplier(step)
        return 1.0 / (1.0 + self.decay * (step - self._end_of_warmup()))

    def _end_of_warmup(self) -> float:
        """Return the step at which the warm-up ends: another one if a change of length within it has stretched it."""
        for start, place, length in reversed(self.stretches):
            if place < self.warmup_steps:
                return start + (self.warmup_steps - place) / (self.total_steps - place) * (length - start)
        return self.warmup_steps

    def _change_length(self, saved: int, planned: int) -> None:
        super()._change_length(saved, planned)
        if self._place(self.last_epoch) >= self.warmup_steps:
            self.change_of_length = ""  # the rest does not depend on the length


@dataclass(eq=False, repr=False)
class WarmupStableDecay(Decay):
    """Schedule that keeps the peak rate, then decays over the last part of the run (Hu et al., 2024, MiniCPM).

    The decay follows 1 - sqrt, the best of the shapes that Hägele et al. (2024) compared.

    Args:
        decay: Part of the steps after the warm-up in which the rate decays (0 to 1).
    """

    decay: ClosedUnitInterval = 0.2

    def after_warmup(self, progress: float) -> float:
        """Return 1 until `1 - decay`, then decay to `final`."""
        if progress <= 1.0 - self.decay:
            return 1.0
        decayed = 1.0 - (1.0 - progress) / self.decay  # exactly 1 at the end
        return self.final + (1.0 - self.final) * (1.0 - math.sqrt(decayed))


@dataclass(eq=False, repr=False)
class OneCycle(Cosine):
    """Schedule that rises along half a cosine and decays along another: the 1cycle policy (Smith and Topin, 2018).

    Args:
        warmup: Steps of the rise: a share of the run below 1, a number of steps from 1 on.
        final: Rate at the end, as a share of the peak (0 to 1).
        initial: Rate at the start, as a share of the peak (0 to 1).
    """

    warmup: NonNegativeFloat = 0.3
    final: ClosedUnitInterval = 4e-6
    initial: ClosedUnitInterval = 0.04

    def warm(self, progress: float, step: float) -> float:
        """Rise from `initial` to 1."""
        return self.initial + (1.0 - self.initial) * 0.5 * (1.0 - math.cos(math.pi * progress))


@dataclass(eq=False, repr=False)
class ReduceOnPlateau(Decay):
    """Schedule that multiplies the rate by a factor when a validation metric stops decreasing.

    A run that is resumed with other arguments keeps its reductions, and the best value of the metric if it is the same.

    Args:
        monitor: Name of the validation metric; lower is better.
        factor: Factor of the rate on a plateau (0 to 1).
        patience: Number of validations without improvement before the rate is reduced (0 or more).
        threshold: Smallest relative decrease that counts as an improvement (0 to 1).
        final: Lowest rate, as a share of the peak (0 to 1).
    """

    monitor: str = "val/loss"
    factor: ClosedUnitInterval = 0.5
    patience: NonNegativeInt = 2
    threshold: ClosedUnitInterval = 1e-3
    needs_length = False

    def __post_init__(self) -> None:
        self.reduction = 1.0
        self.best = math.inf
        self.validations_without_improvement = 0
        super().__post_init__()

    def after_warmup(self, progress: float) -> float:
        """Return the product of the reductions so far, at least `final`."""
        return max(self.final, self.reduction)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; of another schedule, from its step on."""
        arguments = state_dict.get("arguments", {})
        if state_dict.get("schedule") == type(self).__name__:
            self.reduction = state_dict["reduction"]
            if arguments.get("monitor") == self.monitor:
                self.best = state_dict["best"]
                self.validations_without_improvement = state_dict["validations_without_improvement"]
        super().load_state_dict(state_dict)

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Count validations without improvement of `monitor`, and reduce the rate if there are more than `patience`.

        Raises:
            ValueError: If the validation did not log `monitor`.
        """
        value = monitored(metrics, self.monitor)
        if value < self.best - abs(self.best if math.isfinite(self.best) else 0.0) * self.threshold:
            self.best = value
            self.validations_without_improvement = 0
            return
        self.validations_without_improvement += 1
        if self.validations_without_improvement > self.patience:
            self.reduction *= self.factor
            self.validations_without_improvement = 0
            # The rate of the next step is set before a validation. A run resumed from the checkpoint of this validation
            # makes that step at the reduced rate, so this run does too.
            self._set_rates()


class InSequence(SequentialLR):
    """Schedules of PyTorch one after another, each from its first step on, as `SequentialLR`.

    Args:
        optimizer: Filled in by the framework.
        schedules: The schedules, without their optimiser.
        milestones: Optimiser steps at which the next schedule begins, one fewer than schedules.
    """

    def __init__(
        self, optimizer: Optimizer, schedules: list[Callable[[Optimizer], LRScheduler]], milestones: list[int]
    ) -> None:
        super().__init__(optimizer, [build(optimizer) for build in schedules], milestones)


class Together(ChainedScheduler):
    """Schedules of PyTorch at the same time: each multiplies the rate, as `ChainedScheduler`.

    Args:
        optimizer: Filled in by the framework.
        schedules: The schedules, without their optimiser.
    """

    def __init__(self, optimizer: Optimizer, schedules: list[Callable[[Optimizer], LRScheduler]]) -> None:
        super().__init__([build(optimizer) for build in schedules], optimizer)


def monitored(metrics: Mapping[str, Any], name: str) -> float:
    """Return the metric of a validation that a schedule depends on.

    Raises:
        ValueError: If the validation did not log it.
    """
    if name not in metrics:
        raise ValueError(
            f"monitors {name!r}, which the validation did not log; it logged {', '.join(sorted(metrics)) or 'nothing'}"
        )
    return float(metrics[name])


def build_schedule(factory: Callable[..., LRScheduler], optimizer: Optimizer, total_steps: float) -> LRScheduler:
    """Return the schedule of an optimiser.

    Args:
        factory: Class of a schedule with its other arguments: ours takes the optimiser and the length of the run; one
            of torch takes the optimiser, and the length if it has an argument `total_steps` that is not set. Or a
            function of the optimiser, or of both.
        optimizer: Its learning rates are the peaks.
        total_steps: Number of optimiser steps of the whole run; if it is not known, infinity or -1 (Lightning's number
            for `max_epochs` of data without a length).

    Raises:
        ValueError: If an argument is wrong, or the schedule depends on a length that is not known.
    """
    is_known = 0 <= total_steps < math.inf
    length = int(total_steps) if is_known else sys.maxsize
    built = built_class(factory)
    if built is not None and built in (ChainedScheduler, SequentialLR):
        raise ValueError(takes_built_schedules(built.__name__))
    if _takes_two(factory) if built is None else issubclass(built, StepSchedule):
        schedule = factory(optimizer, length)
    elif built is None:
        schedule = factory(optimizer)
    else:
        given = getattr(factory, "keywords", {})
        is_given = any(given.get(name) is not None for name in ("total_steps", "epochs"))
        takes_length = "total_steps" in signature(built).parameters and not is_given
        schedule = factory(optimizer, **({"total_steps": length} if takes_length else {}))
    if not is_known and _needs_length(schedule):
        raise ValueError(
            f"{type(schedule).__name__} depends on the length of the run, which is unknown; set trainer.max_steps, or "
            "trainer.max_epochs if the data have a length, or take Constant with a warmup in steps"
        )
    return schedule


def takes_built_schedules(name: str) -> str | None:
    """Return what to take in place of a schedule of PyTorch that no YAML can build, or `None` for another one."""
    if name not in (ChainedScheduler.__name__, SequentialLR.__name__):
        return None
    return (
        f"{name} takes schedules that are built already, which a YAML cannot contain; take InSequence or Together of "
        "lightning_modules.optim.schedules"
    )


def _takes_two(function: Callable) -> bool:
    """Return whether a function can be called with two arguments."""
    try:
        signature(function).bind(None, None)
    except TypeError:
        return False
    return True


def _needs_length(schedule: LRScheduler) -> bool:
    if isinstance(schedule, StepSchedule):
        return schedule.needs_length or 0 < schedule.warmup < 1
    return hasattr(schedule, "total_steps")
