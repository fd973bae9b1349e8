"""Parameter groups, learning-rate schedules, and the types of `optimizer:` and `lr_scheduler:` in YAML.

YAML names an optimiser and a schedule, and gives all of their arguments but the first ones: the parameter groups, which
the module decides, and the length of the run, which the trainer knows. What YAML declares is therefore a factory.
"""

from collections.abc import Callable, Iterable

from torch.optim import Optimizer

from lightning_modules.optim.groups import weight_decay_groups
from lightning_modules.optim.schedules import StepSchedule

OptimizerFactory = Callable[[Iterable], Optimizer]
# Only our own schedules: those of torch take other second arguments (OneCycleLR would read the total as its max_lr).
ScheduleFactory = Callable[[Optimizer, int], StepSchedule]

__all__ = ["OptimizerFactory", "ScheduleFactory", "StepSchedule", "weight_decay_groups"]
