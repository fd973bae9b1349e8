"""Parameter groups, learning-rate schedules, and the types of `optimizer:` and `lr_scheduler:` in YAML.

YAML names an optimiser and a schedule with all arguments except two: the parameter groups, which come from the module,
and the number of steps, which comes from the trainer. The parser therefore turns each section into a factory.
"""

from collections.abc import Callable, Iterable

from torch.optim import Optimizer

from lightning_modules.optim.groups import ParameterGroups, weight_decay_groups
from lightning_modules.optim.muon import Muon
from lightning_modules.optim.schedules import StepSchedule

OptimizerFactory = Callable[[Iterable], Optimizer]
# Only our own schedules: those of torch have other second arguments (OneCycleLR would take the total as its max_lr).
ScheduleFactory = Callable[[Optimizer, int], StepSchedule]

__all__ = ["Muon", "OptimizerFactory", "ParameterGroups", "ScheduleFactory", "StepSchedule", "weight_decay_groups"]
