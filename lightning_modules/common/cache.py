"""The folder of the cache on this machine."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of the cache, which can be deleted at any time.

    It is `$LLM_TRAIN_CACHE` if that is set, else `llm-train` in `$XDG_CACHE_HOME` or `~/.cache`.
    """
    if chosen := os.environ.get("LLM_TRAIN_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-train"
