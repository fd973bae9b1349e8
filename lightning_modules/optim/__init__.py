"""Parameter groups, learning-rate schedules, and the types of `optimizer:` and `lr_scheduler:` in YAML.

YAML names an optimiser and a schedule with all arguments except two: the parameter groups, which come from the module,
and the number of steps, which comes from the trainer. The parser therefore turns each section into a factory. Every
optimiser and every schedule of torch can be named.
"""

from collections.abc import Callable, Iterable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.optim.groups import ParameterGroups, weight_decay_groups
from lightning_modules.optim.muon import Muon
from lightning_modules.optim.resumed import OptimizerSettings
from lightning_modules.optim.schedules import StepSchedule, build_schedule
from lightning_modules.optim.unusable import check_arguments, check_optimizer, refusals

OptimizerFactory = Callable[[Iterable], Optimizer]
# Our schedules take the number of steps too; the second arguments of torch's are others (OneCycleLR's is max_lr).
ScheduleFactory = Callable[[Optimizer, int], StepSchedule] | Callable[[Optimizer], LRScheduler]

__all__ = [
    "Muon",
    "OptimizerFactory",
    "OptimizerSettings",
    "ParameterGroups",
    "ScheduleFactory",
    "StepSchedule",
    "build_schedule",
    "check_arguments",
    "check_optimizer",
    "refusals",
    "weight_decay_groups",
]
