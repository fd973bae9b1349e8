"""The lines at the start of a run: where it writes, what it trains, on how much data, and on which device."""

import math
from pathlib import Path

import lightning as L
import torch
from torch import nn

from lightning_modules.base import GradientFreeModule
from lightning_modules.optim.schedules import StepSchedule
from lightning_modules.runtime.stages import lacks_validation

Lines = list[tuple[str, str]]  # a word of at most seven letters, and a text


def opening_lines(trainer: L.Trainer, module: L.LightningModule, folder: Path) -> Lines:
    """Return the lines about a fit that begins."""
    where = str(folder) + (f", resumed at step {trainer.global_step}" if trainer.global_step else "")
    model = type(module).__name__
    if not isinstance(module, GradientFreeModule):
        model += f": {_parameters(module)}"
    lines = [("run", where), ("model", model)]
    if data := _data(trainer):
        lines.append(("epoch", data))
    if lacks_validation(trainer):
        reason = "trainer.limit_val_batches is 0" if trainer.limit_val_batches == 0 else "no data is held out"
        lines.append(("val", f"none, since {reason}; the run writes no best checkpoint"))
    if not isinstance(module, GradientFreeModule):  # its steps are batches that it reads
        lines.append(("steps", _steps(trainer)))
    return [*lines, ("device", _device(trainer))]


def block(lines: Lines) -> str:
    """Return lines with their texts below each other."""
    return "\n".join(f"{what:<8}{text}" for what, text in lines)


def _parameters(module: nn.Module) -> str:
    trained = [parameter.requires_grad for parameter in module.parameters()]
    sizes = [parameter.numel() for parameter in module.parameters()]
    n_trained = sum(size for size, is_trained in zip(sizes, trained, strict=True) if is_trained)
    if all(trained):
        return f"{sum(sizes):,} parameters, all trained"
    return f"{sum(sizes):,} parameters, {n_trained:,} of them trained ({n_trained / sum(sizes):.2%})"


def _data(trainer: L.Trainer) -> str | None:
    """Return the examples of an epoch, and their tokens if all have the same number; `None` for another loader."""
    sampler, dataset = (getattr(trainer.train_dataloader, name, None) for name in ("sampler", "dataset"))
    n = getattr(sampler, "n", None)
    if n is None:
        return None
    if (block_size := getattr(dataset, "block_size", None)) is None:
        return f"{n:,} examples"
    return f"{n:,} examples of {block_size:,} tokens: {n * block_size:,} tokens"


def _steps(trainer: L.Trainer) -> str:
    total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    size = getattr(getattr(trainer.train_dataloader, "sampler", None), "batch_size", None)
    each = f" of {size * trainer.accumulate_grad_batches:,} examples" if size else ""
    if total < 0:  # the data does not say how long an epoch is
        return f"{epochs(trainer.max_epochs or 0)} of unknown length"
    if not math.isfinite(total):
        return f"no limit{each and f', each{each}'}"
    if not math.isfinite(batches):
        return f"{total:,}{each}"
    n_epochs = total / math.ceil(batches / trainer.accumulate_grad_batches)
    line = f"{total:,}{each}, {epochs(n_epochs)}"
    if min(trainer.max_steps, trainer.max_epochs or -1) > 0:  # one may be a flag, which the other makes useless
        limits = [f"max_steps {trainer.max_steps}", f"max_epochs {trainer.max_epochs}"]
        first, second = limits if total >= trainer.max_steps else reversed(limits)
        line += f"; {first} ends the run before {second}"
    return line + _warm_up(trainer, total)


def _warm_up(trainer: L.Trainer, total: int) -> str:
    """Return a remark if the warm-up of a schedule is longer than the run, as in a run that a flag makes shorter."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    steps = max((schedule.warmup_steps for schedule in schedules if isinstance(schedule, StepSchedule)), default=0)
    if steps <= total:
        return ""
    return f"; the warm-up takes {steps:,}: the learning rate reaches {total / steps:.0%} (lr_scheduler.warmup)"


def epochs(n: float) -> str:
    """Return a number of epochs in words."""
    if 0 < n < 0.01:
        return "a small part of an epoch"
    return f"{n:.3g} epoch{'' if f'{n:.3g}' == '1' else 's'}"


def _device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{f'{trainer.world_size} x ' if trainer.world_size > 1 else ''}{name}, precision {trainer.precision}"
