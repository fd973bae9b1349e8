"""Learning-rate schedules that step with the optimiser and depend on the number of steps of the run.

Each schedule multiplies the learning rate of the optimiser (`optimizer: lr`, the peak). After a linear warm-up it
follows a curve over the rest of the run, along which `progress` increases from 0 to 1:

| schedule             | multiplier after the warm-up                                       |
|----------------------|--------------------------------------------------------------------|
| `Constant`           | 1                                                                  |
| `Linear`             | a straight line from 1 to `final`                                  |
| `Cosine`             | half a cosine from 1 to `final` (Loshchilov and Hutter, 2017)      |
| `InverseTime`        | 1 / (1 + `decay` * steps since warm-up) (Robbins and Monro, 1951)  |
| `WarmupStableDecay`  | 1, then a decay over the last part (Hu et al., 2024)               |
| `OneCycle`           | a cosine down to `final`, after a cosine warm-up (Smith, 2018)     |
| `ReduceOnPlateau`    | multiplied by `factor` when a validation metric stops improving    |
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.common.ranges import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt


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
        self.warmup_steps = round(self.warmup * self.total_steps) if self.warmup < 1 else int(self.warmup)
        super().__init__(self.optimizer)

    def multiplier(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a share of the peak."""
        if step < self.warmup_steps:
            return self.warm(step / self.warmup_steps, 1 / self.warmup_steps)
        rest = max(1, self.total_steps - self.warmup_steps)
        return self.after_warmup(min(1.0, (step - self.warmup_steps) / rest))

    def warm(self, progress: float, step: float) -> float:
        """Return the multiplier in the warm-up; it is not 0 at the first step, so that this step learns too.

        Args:
            progress: Completed part of the warm-up, from 0 to 1.
            step: Part of the warm-up that one step is.
        """
        return progress + step

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
        """Return the state without the length of the run, so that a run can be resumed with more steps."""
        return {k: v for k, v in super().state_dict().items() if k not in ("total_steps", "warmup", "warmup_steps")}


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
    """Schedule that decays along a straight line."""

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

    def multiplier(self, step: int) -> float:
        """Return the learning rate of a step as a share of the peak."""
        since = step - self.warmup_steps
        return super().multiplier(step) if since < 0 else 1.0 / (1.0 + self.decay * since)


@dataclass(eq=False, repr=False)
class WarmupStableDecay(Decay):
    """Schedule that keeps the peak rate, then decays over the last part of the run (Hu et al., 2024, MiniCPM).

    The decay follows 1 - sqrt, the best of the shapes that Haegele et al. (2024) compared.

    Args:
        decay: Part of the steps after the warm-up in which the rate decays (0 to 1).
    """

    decay: ClosedUnitInterval = 0.2

    def after_warmup(self, progress: float) -> float:
        """Return 1 until `1 - decay`, then decay to `final`."""
        if progress <= 1.0 - self.decay:
            return 1.0
        decayed = (progress - (1.0 - self.decay)) / self.decay
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

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Count validations without improvement of `monitor`, and reduce the rate if there are more than `patience`.

        Raises:
            ValueError: If the validation did not log `monitor`.
        """
        if self.monitor not in metrics:
            raise ValueError(
                f"lr_scheduler: ReduceOnPlateau monitors {self.monitor!r}, which the validation did not log; "
                f"it logged {', '.join(sorted(metrics)) or 'nothing'}"
            )
        value = float(metrics[self.monitor])
        if value < self.best - abs(self.best if math.isfinite(self.best) else 0.0) * self.threshold:
            self.best = value
            self.validations_without_improvement = 0
            return
        self.validations_without_improvement += 1
        if self.validations_without_improvement > self.patience:
            self.reduction *= self.factor
            self.validations_without_improvement = 0
