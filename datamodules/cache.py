"""The cache of the datamodules: a folder on this machine, whose files are complete or absent."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_modules.common.files import atomic_file


def cache_root() -> Path:
    """Return the folder of the cache, which can be deleted at any time.

    It is `$LLM_TRAIN_CACHE` if that is set, else `llm-train` in `$XDG_CACHE_HOME` or `~/.cache`.
    """
    if chosen := os.environ.get("LLM_TRAIN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-train"


def digest(value: Any) -> str:
    """Return a hash of 20 hexadecimal digits of a value that JSON can represent, for file names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def cached_array(target: Path, compute: Callable[[], np.ndarray], mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Return the array of a `.npy` file, mapped into memory with mode `r`; compute and write it if the file is missing.

    A file that is damaged, or that holds pickled objects, is replaced; nothing is unpickled.
    """
    try:
        return np.load(target, mmap_mode=mmap_mode)
    except (OSError, ValueError, EOFError):
        with atomic_file(target) as file:
            np.save(file, compute())
    return np.load(target, mmap_mode=mmap_mode)
