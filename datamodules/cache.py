"""What datamodules keep between runs: one folder on this machine, written so that nobody ever reads half a file."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_modules.common.files import atomic_file


def cache_root() -> Path:
    """Return `$LLM_TRAIN_CACHE`, or `llm-train` under `$XDG_CACHE_HOME` or `~/.cache`. It is always safe to delete."""
    if chosen := os.environ.get("LLM_TRAIN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-train"


def digest(value: Any) -> str:
    """Return a short hash of anything JSON can hold, fit for a file name."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def cached_array(target: Path, compute: Callable[[], np.ndarray], mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Return the array in a `.npy` file, computed where there is none, or none that can be read.

    A file that is damaged, or holds pickled objects, is not looked into but made anew.
    """
    try:
        return np.load(target, mmap_mode=mmap_mode)
    except (OSError, ValueError, EOFError):
        with atomic_file(target) as file:
            np.save(file, compute())
    return np.load(target, mmap_mode=mmap_mode)
