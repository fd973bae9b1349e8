"""The GPUs of this machine, found without importing PyTorch, and how many of them a run asks for."""

import itertools
import os
import re
import subprocess
from collections.abc import Mapping
from typing import Any

_SECONDS = 60  # for nvidia-smi, which wakes up the GPUs


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process can use, as `CUDA_VISIBLE_DEVICES` takes them.

    They are the entries of that variable if it is set (numbers or UUIDs; CUDA ignores those from the first negative one
    on), and else the UUIDs that `nvidia-smi` lists, of the parts of a GPU that is divided (MIG).
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        entries = (entry.strip() for entry in given.split(","))
        return list(itertools.takewhile(lambda entry: entry and not entry.startswith("-"), entries))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = []
    for gpu in re.split(r"^(?=GPU \d)", listed, flags=re.MULTILINE):
        whole, *parts = re.findall(r"\(UUID: (\S+)\)", gpu) or [None]
        gpus += parts or ([whole] if whole else [])
    return gpus


def gpus_of(trainer: Mapping[str, Any], share: int) -> int:
    """Return how many GPUs a run is to have of its own, 0 if it is to see them all.

    Args:
        trainer: The section `trainer:` of the run.
        share: Number of GPUs for a run that takes all devices (`auto`).
    """
    devices = trainer.get("devices", 1)
    if trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
        return 0
    if devices in ("auto", "-1", -1):
        return share
    # A list, or text such as `0,1`, names devices by their numbers among all.
    return int(devices) if re.fullmatch(r"\d+", str(devices)) else 0
