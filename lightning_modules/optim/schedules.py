"""Learning-rate schedules that are stepped once an optimiser step and told how many steps the run has.

Every schedule is a multiplier of the optimiser's own learning rate (`optimizer: lr` is the peak). It starts with a
linear warm-up and then follows a curve over the rest of the run, `progress` going from 0 to 1:

| schedule             | multiplier after the warm-up                                       |
|----------------------|--------------------------------------------------------------------|
| `Constant`           | 1                                                                  |
| `Linear`             | a straight line from 1 to `final`                                  |
| `Cosine`             | half a cosine from 1 to `final` (Loshchilov and Hutter, 2017)      |
| `InverseTime`        | 1 / (1 + `decay` * steps since), the hyperbola of Robbins and Monro |
| `WarmupStableDecay`  | 1, then a decay over the last share (Hu et al., 2024)              |
| `OneCycle`           | cosine up from a small rate, then down to one smaller (Smith 2018) |
| `ReduceOnPlateau`    | times `factor` whenever a validation metric has stopped improving  |
"""

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def _require_share(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"lr_scheduler: {name} must be between 0 and 1, got {value}")
    return value


class StepSchedule(LRScheduler):
    """What the schedules share: the warm-up, and the multiplier of the learning rate.

    Args:
        optimizer: Filled in by the framework.
        total_steps: Number of optimiser steps of the whole run; filled in by the framework.
        warmup: Steps of linear warm-up: a share of the run below 1, a number of steps from 1 on.

    Raises:
        ValueError: If the warm-up is negative.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0) -> None:
        self.total_steps = total_steps
        if warmup < 0:
            raise ValueError(f"lr_scheduler: warmup must not be negative, got {warmup}")
        self.warmup_steps = round(warmup * total_steps) if warmup < 1 else int(warmup)
        super().__init__(optimizer)

    def multiplier(self, step: int) -> float:
        """Learning rate of a step (counted from 0), as a share of the peak."""
        if step < self.warmup_steps:
            return self.warm(step / self.warmup_steps, 1 / self.warmup_steps)
        rest = max(1, self.total_steps - self.warmup_steps)
        return self.after_warmup(min(1.0, (step - self.warmup_steps) / rest))

    def warm(self, progress: float, step: float) -> float:
        """Multiplier in the warm-up, whose first step already learns; `step` is one step's share of it."""
        return progress + step

    def after_warmup(self, progress: float) -> float:
        """Multiplier after the warm-up; `progress` goes from 0 to 1."""
        raise NotImplementedError

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Called with the metrics of each validation; most schedules do not look."""

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        multiplier = self.multiplier(self.last_epoch)
        return [base_lr * multiplier for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: not the length of the run, so that a run can be resumed with more steps."""
        return {k: v for k, v in super().state_dict().items() if k not in ("total_steps", "warmup_steps")}


class Constant(StepSchedule):
    """The peak rate throughout, after the warm-up."""

    def after_warmup(self, progress: float) -> float:
        """Always 1."""
        return 1.0


class Decay(StepSchedule):
    """What `Linear` and `Cosine` share: a rate to end at.

    Args:
        optimizer: Filled in by the framework.
        total_steps: Filled in by the framework.
        warmup: Steps of linear warm-up: a share of the run below 1, a number of steps from 1 on.
        final: Rate at the end, as a share of the peak (0 to 1).
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0, final: float = 0.0) -> None:
        self.final = _require_share("final", final)
        super().__init__(optimizer, total_steps, warmup)


class Linear(Decay):
    """Decays along a straight line."""

    def after_warmup(self, progress: float) -> float:
        """From 1 to `final`."""
        return 1.0 + (self.final - 1.0) * progress


class Cosine(Decay):
    """Decays along half a cosine (Loshchilov and Hutter, 2017, without restarts)."""

    def after_warmup(self, progress: float) -> float:
        """From 1 to `final`."""
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


class InverseTime(StepSchedule):
    """Decays as 1 / (1 + decay t), t being the steps after the warm-up, whatever the length of the run.

    Args:
        optimizer: Filled in by the framework.
        total_steps: Filled in by the framework.
        warmup: Steps of linear warm-up: a share of the run below 1, a number of steps from 1 on.
        decay: How much 1 / rate grows in a step, as a share of what it is at the peak (0 or more).

    Raises:
        ValueError: If the decay is negative.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0, decay: float = 1e-8) -> None:
        if decay < 0:
            raise ValueError(f"lr_scheduler: decay must not be negative, got {decay}")
        self.decay = decay
        super().__init__(optimizer, total_steps, warmup)

    def multiplier(self, step: int) -> float:
        """Learning rate of a step, as a share of the peak."""
        since = step - self.warmup_steps
        return super().multiplier(step) if since < 0 else 1.0 / (1.0 + self.decay * since)


class WarmupStableDecay(StepSchedule):
    """Stays at the peak, then decays over the last share of the run (Hu et al., 2024, MiniCPM).

    The decay is 1 - sqrt, the shape that Haegele et al. (2024) found best.

    Args:
        optimizer: Filled in by the framework.
        total_steps: Filled in by the framework.
        warmup: Steps of linear warm-up: a share of the run below 1, a number of steps from 1 on.
        decay: Share of the steps after the warm-up over which the rate decays (0 to 1).
        final: Rate at the end, as a share of the peak (0 to 1).
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.0, decay: float = 0.2, final: float = 0.0
    ) -> None:
        self.decay = _require_share("decay", decay)
        self.final = _require_share("final", final)
        super().__init__(optimizer, total_steps, warmup)

    def after_warmup(self, progress: float) -> float:
        """1, and from `1 - decay` on down to `final`."""
        if progress <= 1.0 - self.decay:
            return 1.0
        decayed = (progress - (1.0 - self.decay)) / self.decay
        return self.final + (1.0 - self.final) * (1.0 - math.sqrt(decayed))


class OneCycle(StepSchedule):
    """One cosine up and one down, the super-convergence policy of Smith and Topin (2018).

    Args:
        optimizer: Filled in by the framework.
        total_steps: Filled in by the framework.
        warmup: Length of the way up: a share of the run below 1, a number of steps from 1 on.
        initial: Rate at the start, as a share of the peak (0 to 1).
        final: Rate at the end, as a share of the peak (0 to 1).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.3,
        initial: float = 0.04,
        final: float = 4e-6,
    ) -> None:
        self.initial = _require_share("initial", initial)
        self.final = _require_share("final", final)
        super().__init__(optimizer, total_steps, warmup)

    def warm(self, progress: float, step: float) -> float:
        """From `initial` to 1."""
        return self.initial + (1.0 - self.initial) * 0.5 * (1.0 - math.cos(math.pi * progress))

    def after_warmup(self, progress: float) -> float:
        """From 1 to `final`."""
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


class ReduceOnPlateau(StepSchedule):
    """Multiplies the rate by a factor whenever a validation metric has stopped falling.

    Args:
        optimizer: Filled in by the framework.
        total_steps: Filled in by the framework.
        warmup: Steps of linear warm-up: a share of the run below 1, a number of steps from 1 on.
        monitor: Name of the validation metric; lower is better.
        factor: What the rate is multiplied by on a plateau (0 to 1).
        patience: Number of validations without improvement that are waited for.
        threshold: Relative improvement that counts as one (0 to 1).
        final: Lowest rate, as a share of the peak (0 to 1).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.0,
        monitor: str = "val/loss",
        factor: float = 0.5,
        patience: int = 2,
        threshold: float = 1e-3,
        final: float = 0.0,
    ) -> None:
        self.monitor = monitor
        self.factor = _require_share("factor", factor)
        self.patience = patience
        self.threshold = _require_share("threshold", threshold)
        self.final = _require_share("final", final)
        self.reduction = 1.0
        self.best = math.inf
        self.validations_without_improvement = 0
        super().__init__(optimizer, total_steps, warmup)

    def after_warmup(self, progress: float) -> float:
        """The product of the reductions so far."""
        return max(self.final, self.reduction)

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Counts validations without improvement of `monitor`, and reduces the rate when there were too many.

        Raises:
            ValueError: If the validation logged no such metric.
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
