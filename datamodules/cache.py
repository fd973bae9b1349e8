"""Arrays in the cache, whose files are complete or absent, and digests for the names of files there."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_modules.common.files import atomic_file
from lightning_modules.common.messages import first_line


def digest(value: Any) -> str:
    """Return a hash of 20 hexadecimal digits of a value that JSON can represent, for file names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def cached_array(target: Path, compute: Callable[[], np.ndarray], mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Return the array of a `.npy` file, mapped into memory with mode `r`; compute and write it if the file is missing.

    A file that is damaged, or that holds pickled objects, is replaced; nothing is unpickled.
    """
    if (found := find_array(target, mmap_mode)) is not None:
        return found
    with atomic_file(target) as file:
        np.save(file, compute())
    return read_array(target, mmap_mode)


def find_array(file: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray | None:
    """Return the array of a `.npy` file as `read_array` does, or `None` if the file is missing or damaged."""
    try:
        return read_array(file, mmap_mode)
    except (OSError, ValueError):
        return None


def read_array(file: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Return the array of a `.npy` file, mapped into memory with mode `r`; nothing is unpickled.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it holds no array of numbers.
    """
    try:
        array = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as Python, and allocates what it says
        raise ValueError(first_line(error)) from error
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive of arrays")
    return array
