"""The optimiser and the schedule of a run: the logged rate, validations, and what a resumed run changes."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_modules.common.messages import say
from lightning_modules.optim.schedules import StepSchedule, monitored
from lightning_modules.runtime.averaging import TRAINED, AveragedWeights
from lightning_modules.runtime.stages import validates_a_fit

_SETTINGS = "optimizer_settings"  # in a checkpoint
_OUR_SCHEDULES = "lightning_modules.optim.schedules"
# Settings of optimisers that keep something for each parameter, which they look up in each step.
_WITH_STATE = {
    "torch.Adam": {"amsgrad"},
    "torch.AdamW": {"amsgrad"},
    "torch.RMSprop": {"centered", "momentum"},
    "transformers.Adafactor": {"beta1"},
}


class OptimizerSettings(L.Callback):
    """Callback of every run: logs the learning rate, tells the schedule of validations, and compares resumed settings.

    The rate is logged as `train/lr`, and once for each share or algorithm of the parameter groups if their rates differ
    (`train/lr/muon`, `train/lr/0.9`).

    A checkpoint restores the settings that it was written with: learning rate, betas, and so on. This callback compares
    them with those of the run that is resumed. The settings of an optimiser, the length of the run, and a schedule of
    this project are changed from the step of the checkpoint on, and a line says so. Another optimiser, other trained
    parameters, a setting for which the checkpoint has no state (`amsgrad` of Adam, for example), and a change of one of
    torch's schedules, which hold their settings in their state, are refused.
    """

    def __init__(self) -> None:
        self._own: dict[str, Any] = {}  # the settings of this run
        self._checkpoint: dict[str, Any] | None = None
        self._changes: list[str] = []
        self._rate_names: dict[str, int] = {}  # name of a metric, place of a group that has this rate

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the settings of this run before those of a checkpoint replace them."""
        if len(trainer.optimizers) != 1:
            return
        optimizer, schedule = trainer.optimizers[0], _schedule(trainer)
        self._own = {"optimizer": _path(optimizer), "groups": [_settings(group) for group in optimizer.param_groups]}
        if schedule is not None:
            self._own |= {"schedule": _path(schedule), "schedule_settings": _schedule_settings(schedule)}
        self._rate_names = _rate_names(self._own["groups"]) if pl_module.automatic_optimization else {}
        self._compare(trainer)

    # --- during the run -----------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Log the learning rate of the step if logging is due."""
        if pl_module.logging_is_due:
            for name, place in self._rate_names.items():
                rate = torch.tensor(float(optimizer.param_groups[place]["lr"]), dtype=torch.float64)  # on the CPU
                pl_module.log(name, rate)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Pass the metrics to a schedule that depends on them; a checkpoint of this validation is written later."""
        schedule, metrics = _schedule(trainer), trainer.callback_metrics
        if not validates_a_fit(trainer):
            return
        try:
            if isinstance(schedule, StepSchedule):
                schedule.observe(metrics)
            elif isinstance(schedule, ReduceLROnPlateau):
                schedule.step(monitored(metrics, getattr(schedule, "monitor", "val/loss")))
        except ValueError as error:
            raise MisconfigurationException(f"lr_scheduler: {type(schedule).__name__}: {error}") from error

    # --- resumed runs -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the settings."""
        checkpoint[_SETTINGS] = self._own

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the settings with those of this run, in `on_fit_start` if its optimiser is not built yet.

        Raises:
            MisconfigurationException: If a setting cannot be changed.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if TRAINED in checkpoint and not any(isinstance(callback, AveragedWeights) for callback in trainer.callbacks):
            raise MisconfigurationException(
                "trainer.callbacks: the checkpoint has averaged weights, and this run does not average them; keep the "
                "callback AveragedWeights"
            )
        if checkpoint.get("optimizer_states"):
            self._checkpoint = checkpoint
            self._compare(trainer)

    def _compare(self, trainer: L.Trainer) -> None:
        """Put the settings of this run into the checkpoint, before Lightning restores from it.

        Raises:
            MisconfigurationException: If a setting cannot be changed.
        """
        if self._checkpoint is None or not self._own:
            return
        checkpoint, self._checkpoint = self._checkpoint, None
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        # Earlier versions saved no settings; their schedules changed none but the learning rate.
        saved = checkpoint.get(_SETTINGS) or {"groups": [_settings(group) for group in groups]}
        if checkpoint["lr_schedulers"]:
            saved.setdefault("schedule", self._own.get("schedule", "a schedule"))
        self._compare_optimizers(trainer.optimizers[0], groups, saved)
        self._compare_schedules(_schedule(trainer), checkpoint, saved)

    def _compare_optimizers(self, optimizer: Optimizer, groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
        own = self._own
        if saved.get("optimizer", own["optimizer"]) != own["optimizer"]:
            raise MisconfigurationException(
                f"optimizer: the checkpoint has the state of {saved['optimizer']}, from which {own['optimizer']} "
                "cannot continue; keep the optimizer, or start a new run"
            )
        sizes, own_sizes = ([len(group["params"]) for group in of] for of in (groups, optimizer.param_groups))
        if sizes != own_sizes:
            raise MisconfigurationException(
                f"optimizer: the checkpoint has groups of {sizes} trained parameters, this run of {own_sizes}; a "
                "resumed run must train the same parameters, at the same shares of the learning rate"
            )
        for group, own_group in zip(groups, optimizer.param_groups, strict=True):
            for name, own_name in zip(*(of.get("param_names", ()) for of in (group, own_group)), strict=False):
                if name != own_name:  # parameters may have no names
                    raise MisconfigurationException(
                        f"optimizer: the checkpoint has the state of {name} in the place of {own_name}; a resumed run "
                        "must train the same parameters, at the same shares of the learning rate"
                    )
        for group, before, now in zip(groups, saved["groups"], own["groups"], strict=True):
            changed = {key: value for key, value in now.items() if before.get(key, value) != value}
            for key in _WITH_STATE.get(own["optimizer"], set()) & changed.keys():
                if not before[key]:
                    raise MisconfigurationException(
                        f"optimizer: the checkpoint has no state for {key}; keep it off, or start a new run"
                    )
            self._changes += [_change(key, value, before[key]) for key, value in changed.items()]
            if "schedule" in own:  # it sets the rate when it is restored
                changed.pop("lr", None)
            elif "schedule" in saved:  # the rate in the checkpoint is one of the schedule
                changed["lr"] = now["lr"]
            group |= changed

    def _compare_schedules(
        self, schedule: LRScheduler | None, checkpoint: dict[str, Any], saved: dict[str, Any]
    ) -> None:
        before, now, step = saved.get("schedule"), self._own.get("schedule"), checkpoint["global_step"]
        own_settings, saved_settings = self._own.get("schedule_settings", {}), saved.get("schedule_settings")
        if isinstance(schedule, StepSchedule):
            if before != now:
                self._changes.append(f"{now} in place of {before or 'no schedule'}")
                # Not the state of the schedule before, which may count validations, or nothing.
                checkpoint["lr_schedulers"] = [{"schedule": before, "last_epoch": step, "_step_count": step + 1}]
            elif saved_settings is not None:
                self._changes += [
                    _change(name, value, saved_settings[name])
                    for name, value in own_settings.items()
                    if saved_settings.get(name, value) != value
                ]
            self._compare_lengths(schedule, checkpoint["lr_schedulers"][0])
        elif schedule is not None and (before != now or saved_settings != own_settings):
            raise MisconfigurationException(
                f"lr_scheduler: {now} cannot take over at step {step} with other settings, "
                f"another learning rate or another length of the run; keep them, or take one of {_OUR_SCHEDULES}"
            )
        elif schedule is None and before is not None:
            self._changes.append(f"no schedule in place of {before}")

    def _compare_lengths(self, schedule: StepSchedule, state: dict[str, Any]) -> None:
        trial = copy.copy(schedule)  # what it changes in the optimiser, Lightning restores next
        trial.load_state_dict(state)
        # A peak of 0 is the user's choice, and not the end of a schedule.
        if trial.change_of_length and any(trial.base_lrs) and not any(trial.get_last_lr()):
            raise MisconfigurationException(
                f"lr_scheduler: the schedule ended before step {trial.last_epoch} with a rate of 0, so a longer run "
                f"would learn nothing; take another ({_OUR_SCHEDULES}.Constant, for example) and a small optimizer.lr, "
                "or start a new run"
            )
        self._changes += [trial.change_of_length] if trial.change_of_length else []

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what the resumed run changes."""
        if self._changes:
            say(f"from step {trainer.global_step} on: {'; '.join(dict.fromkeys(self._changes))}")
            self._changes = []


def _schedule(trainer: L.Trainer) -> LRScheduler | None:
    configs = trainer.lr_scheduler_configs
    return configs[0].scheduler if configs else None


def _path(instance: object) -> str:
    """Return the package and the name of a class, which may move within its package."""
    return f"{type(instance).__module__.split('.')[0]}.{type(instance).__qualname__}"


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group; its learning rate is the peak that a schedule multiplies."""
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names", "initial_lr")}
    return settings | {"lr": group.get("initial_lr", group["lr"])}


def _schedule_settings(schedule: LRScheduler) -> dict[str, Any]:
    """Return what tells apart two schedules of one class: of torch's schedules, the state before the first step."""
    state = schedule.state_dict()
    if isinstance(schedule, StepSchedule):
        return {name: value for name, value in state["arguments"].items() if name != "total_steps"}
    return state


def _rate_names(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Return the names of the logged rates, each with the place of the first group that has it."""
    if len({group["lr"] for group in groups}) == 1:
        return {"train/lr": 0}
    names: dict[str, int] = {}
    for place, group in enumerate(groups):
        share = f"{group['lr_share']:.3g}" if "lr_share" in group else None
        label = "/".join(part for part in ("train/lr", group.get("algorithm"), share) if part)
        names.setdefault(label, place)
    return names


def _change(name: str, value: Any, before: Any) -> str:
    now, then = (f"{each:g}" if isinstance(each, float) else each for each in (value, before))
    return f"{name} {now} in place of {then}"
