"""The command, the configurations and the studies: everything a user launches; and runs from Python."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return `Run` or `load_run`, which `experiments.api` defines; importing it takes seconds."""
    if name in ("Run", "load_run"):
        from experiments import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
