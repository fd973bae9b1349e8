"""Whether the metrics that callbacks and schedules monitor are logged, checked before the first step."""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_modules.base import ExperimentModule
from lightning_modules.runtime.stages import lacks_validation

_OF_TRAINING = ("train/loss", "train/lr", "train/grad_norm")
_OWN = ("lightning.", "lightning_modules.", "experiments.")
_SIMILAR = 0.85  # of two names, one of which is taken for a misspelling of the other


def check(module: ExperimentModule, callbacks: Iterable[Any], schedule: Any) -> None:
    """Refuse the name of a metric that is nearly that of one which the module logs.

    Other unknown names may be those of metrics that callbacks log. They are not refused, and neither is any name if
    a callback is the user's.

    Args:
        module: The module.
        callbacks: Callbacks of the run.
        schedule: Factory of the learning-rate schedule.

    Raises:
        MisconfigurationException: If there is such a name.
    """
    callbacks = list(callbacks)
    known = _logged_by(module)
    if not known or not all(type(callback).__module__.startswith(_OWN) for callback in callbacks):
        return
    for owner, argument, name in _monitored(callbacks, schedule):
        with_split = [f"val/{name}"] if f"val/{name}" in known else []
        similar = with_split or difflib.get_close_matches(name, known, n=1, cutoff=_SIMILAR)
        if name not in known and similar:
            raise MisconfigurationException(
                f"{owner}: {argument} is {name!r}, and the run logs no such metric (did you mean {similar[0]!r}?)"
            )


def check_tracked(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse a run that validates with a module that tracks no metric, once its data is known.

    A module may also set its metric at the start of the training or of a validation.

    Raises:
        MisconfigurationException: If it is one.
    """
    kind = type(module)
    validates = isinstance(module, ExperimentModule) and kind.validation_step is ExperimentModule.validation_step
    hooks = ("on_train_start", "on_train_epoch_start", "on_validation_start", "on_validation_epoch_start")
    sets_it_later = any(is_overridden(hook, module) for hook in hooks)
    if validates and module.val_metrics is None and not sets_it_later and not lacks_validation(trainer):
        raise MisconfigurationException(
            f"{kind.__name__}: the run validates, and the module tracks no metric: call self.track(metric) in its "
            "constructor, or give --trainer.limit_val_batches 0"
        )


def _monitored(callbacks: Iterable[Any], schedule: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the callbacks and the schedule that name a metric, each with the argument and the metric."""
    for callback in callbacks:
        for argument in ("monitor", "train_metric", "val_metric"):
            if isinstance(name := getattr(callback, argument, None), str):
                yield type(callback).__name__, argument, name
    if isinstance(name := getattr(schedule, "keywords", {}).get("monitor"), str):
        yield "lr_scheduler", "monitor", name


def _logged_by(module: ExperimentModule) -> list[str]:
    """Return the names of the metrics that a module logs; an empty list if they depend on the data."""
    if module.val_metrics is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of a metric without data
        try:
            results = module.evaluation_results(module.val_metrics.clone(), "val")
        except Exception:  # some cannot be computed without data
            return []
    return [*_OF_TRAINING, *(f"val/{name}" for name in results)]
