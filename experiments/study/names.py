"""Names of studies and of their arms, fit for folders."""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.yaml_files import read_yaml

_MAX_LENGTH = 100  # bytes of an arm's name: folders take 255, tables in W&B much less


def folder_name(text: str) -> str:
    """Return the text with every character replaced that a folder, a shell or W&B would not accept.

    Letters and digits of every script are kept. A text without any gets a name from its hash.
    """
    return _shortened(_plain(text) or f"name-{_digest(text)}")


def _plain(text: str) -> str:
    return re.sub(r"[^\w.=,-]+", "-", unicodedata.normalize("NFC", text)).strip(".-")


def _shortened(name: str) -> str:
    if len(name.encode()) <= _MAX_LENGTH:
        return name
    return f"{name.encode()[: _MAX_LENGTH - 9].decode(errors='ignore')}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def flag_value(value: Any) -> str:
    """Return a setting as the text of a flag: that of `wandb agent`, but for null, which that writes as `None`."""
    return json.dumps(value) if _has_null(value) else str(value)


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_null, value.values()))
    return any(map(_has_null, value)) if isinstance(value, list) else value is None


def arm_name(settings: Mapping[str, Any]) -> str:
    """Return a name for the run with these settings, such as `initialization=xavier,seed=2`."""
    flat = dict(flatten_settings(settings))
    keys = {key: "seed" if key == "seed_everything" else shortest_ending(key, flat) for key in flat}
    name = ",".join(f"{keys[key]}={_short_value(value)}" for key, value in flat.items())
    return _shortened(name)


def arm_of_agent() -> str | None:
    """Return the arm's name if a `wandb agent` has started this process, and `None` otherwise."""
    file = os.environ.get("WANDB_SWEEP_PARAM_PATH")
    if file is None or "WANDB_SWEEP_ID" not in os.environ or not Path(file).is_file():
        return None
    given = read_yaml(Path(file))
    return arm_name({key: item["value"] for key, item in given.items() if key != "wandb_version"}) or None


def flatten_settings(settings: Mapping[str, Any], *parents: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each setting in nested ones."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_settings(value, *parents, key)
        else:
            yield ".".join((*parents, key)), value


def shortest_ending(path: str, paths: Iterable[str]) -> str:
    """Return the last parts of a dotted path, as few as tell it from the other paths: `lr`, or `optimizer.lr`."""
    parts = path.split(".")
    endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    unique = (ending for ending in endings if sum(f".{other}".endswith(f".{ending}") for other in paths) == 1)
    return next(unique, path)


def _short_value(value: Any) -> str:
    if isinstance(value, int):
        return json.dumps(value)  # true, -1
    if isinstance(value, float):
        return min(repr(value), f"{value:.4g}", key=len).replace("e+", "e")
    if not isinstance(value, str):
        value = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return re.sub(r"[,=-]+", "-", _plain(last_part(value))) or "none"


def last_part(value: str) -> str:
    """Return the name of a class without its modules, the stem of a YAML file, and any other text as it is.

    The name of a class begins with a capital: `my.txt` is a file.
    """
    if value.endswith(".yaml"):
        return Path(value).stem
    return value.rsplit(".", 1)[-1] if re.fullmatch(r"([A-Za-z_]\w*\.)+_?[A-Z]\w*", value) else value
