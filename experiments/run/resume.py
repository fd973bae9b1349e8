"""What a resumed run may change of its configuration.

The configuration of a resumed run is compared with the `config.yaml` of the run that its checkpoint belongs to. A
change applies from the step of the checkpoint on, and `environment.json` records it with that step; or it is refused in
one line, because the state in the checkpoint would not be that of the new configuration. Three kinds are refused:

- the seed and the data, except how they are loaded: the checkpoint knows how many batches are done, and the same
  batches must follow. A file or folder that was moved or copied may have another path;
- the model, except its dropout and how it is computed: the weights are those of the model as it was built;
- the class of the optimiser: its state fits no other. `OptimizerSettings` refuses any change of a schedule of torch,
  for the same reason.

Learning rate, weight decay and other settings of the optimiser, the schedules of this project, the length of the run,
devices, strategy, precision, clipping, validation, loggers and callbacks may change. `OptimizerSettings` also says
what becomes of the rate.
"""

import filecmp
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from experiments.class_paths import current
from experiments.yaml_files import numbered_keys

Changes = dict[str, list[Any]]  # by the name of a setting as in a flag: the value before and now

_DATA = "the checkpoint counts the batches that are done, and others would follow"
_MODEL = "the weights in the checkpoint are those of the model as it was built"
_STATE = "the state in the checkpoint fits no other"
# The first pattern that matches a setting decides: why it cannot change, or `None` if it can.
_RULES: tuple[tuple[str, str | None], ...] = (
    ("seed_everything", _DATA),
    ("data.num_workers", None),
    ("data.cache_dir", None),
    ("data*", _DATA),
    ("model.compile", None),
    ("model.attention", None),
    ("model.*dropout", None),
    ("model.count_workers", None),
    ("model*", _MODEL),
    ("trainer.accumulate_grad_batches", _DATA),
    ("trainer.limit_train_batches", _DATA),
    ("trainer.overfit_batches", _DATA),
    ("optimizer", _STATE),
    ("*", None),
)
# Of these, 1 is one batch and 1.0 is all.
_NUMBERS_OR_SHARES = ("trainer.limit_*_batches", "trainer.overfit_batches", "trainer.val_check_interval")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Return the settings of a resumed run that differ from those of its saved configuration.

    Args:
        before: The saved configuration. An earlier version may have written it: settings that it lacks are not
            compared, and a class that has moved is the same class.
        now: The configuration of the resumed run.

    Raises:
        MisconfigurationException: If one of them cannot change.
    """
    saved, own = (dict(_settings(config)) for config in (before, now))
    changed = {
        name: [saved[name], own[name]] for name in own if name in saved and _differ(name, saved[name], own[name])
    }
    for name, (was, wanted) in changed.items():
        reason = next(reason for pattern, reason in _RULES if fnmatchcase(name, pattern))
        if reason and not _have_moved(was, wanted):
            raise MisconfigurationException(
                f"{name}: it is {wanted}, and the run to resume has {was}: {reason}; keep it, or start a new run"
            )
    return changed


def _differ(name: str, was: Any, wanted: Any) -> bool:
    is_either = wanted == 1 and any(fnmatchcase(name, pattern) for pattern in _NUMBERS_OR_SHARES)
    return was != wanted or (is_either and type(was) is not type(wanted))


def _settings(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration by their names as flags; a class is the setting of its section.

    The items of a list of classes go by their places, and their classes are the setting of the list. The callbacks,
    loggers and plugins of the trainer go by the names of their classes, since their order does not matter.
    """
    parts: Mapping[str, Any]
    if isinstance(config, Mapping) and "class_path" in config:
        yield name, current(config["class_path"])
        parts = {**(config.get("init_args") or {}), **(config.get("dict_kwargs") or {})}
    elif isinstance(config, Mapping):
        if name.startswith(("data.", "model.")):  # no section, in which another version may have more keys
            yield name, sorted(map(str, config))
        parts = {key: value for key, value in config.items() if name or key != "run"}
    elif isinstance(config, list) and any(isinstance(item, Mapping) and "class_path" in item for item in config):
        classes = [_class_name(item) for item in config]
        if name.startswith("trainer."):
            yield name, sorted(classes)
            parts = dict(zip(numbered_keys(classes), config, strict=True))
        else:
            yield name, classes
            parts = {str(place): item for place, item in enumerate(config)}
    else:
        yield name, config
        return
    for key, value in parts.items():
        yield from _settings(value, f"{name}.{key}" if name else key)


def _class_name(item: Any) -> str:
    """Return the name of the class that an item of a list names, or that of its type, such as `str` for a file."""
    is_class = isinstance(item, Mapping) and "class_path" in item
    return item["class_path"].rpartition(".")[-1] if is_class else type(item).__name__


def _have_moved(was: Any, wanted: Any) -> bool:
    """Return whether a setting names files of the same names elsewhere, of the same content if the old ones exist."""
    before, now = ([value] if isinstance(value, str) else value for value in (was, wanted))
    if not isinstance(before, list) or not isinstance(now, list) or len(before) != len(now):
        return False
    if not all(isinstance(value, str) for value in (*before, *now)):
        return False
    return all(_is_moved(Path(old), Path(new)) for old, new in zip(before, now, strict=True))


def _is_moved(old: Path, new: Path) -> bool:
    if old.name != new.name or not new.exists():
        return False
    if old.is_dir() and new.is_dir():
        files = sorted(path.relative_to(old) for path in old.rglob("*") if path.is_file())
        return files == sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file()) and all(
            filecmp.cmp(old / file, new / file, shallow=False) for file in files
        )
    return not old.exists() or (old.is_file() and new.is_file() and filecmp.cmp(old, new, shallow=False))
