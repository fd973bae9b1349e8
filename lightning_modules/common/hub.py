"""The Hugging Face hub: which names are not on it, and whether it can be reached."""

import re
from pathlib import Path

_REPOSITORY = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)


def is_path(name: str) -> bool:
    """Return whether a name means a file or folder of this machine, which may be missing, and not a name on the hub.

    A name on the hub is `name` or `owner/name`. A path such as `folder/name` looks the same; it is one if there is such
    a folder, or if it is in `runs`.
    """
    folder, slash, _ = name.partition("/")
    is_below = bool(slash) and (folder == "runs" or Path(folder).is_dir())
    return is_below or not _REPOSITORY.fullmatch(name) or name.endswith(".json") or Path(name).exists()


def hub_answers() -> bool:
    """Return whether the Hugging Face hub answers one request within ten seconds.

    Without a network, the hub's own library would retry for most of a minute. With `HF_HUB_OFFLINE=1` the result is
    false at once.
    """
    from huggingface_hub import constants, get_session  # imported where used: it is slow to import

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # no network, or offline mode
        return False
    return True
