"""Datasets of the Hugging Face hub, with error messages of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.common.hub import hub_answers, is_path
from lightning_modules.common.messages import first_line

ADVICE = "offline.yaml of the topic needs no network"


def load_hub_dataset(
    dataset: str,
    split: str,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    advice: str = ADVICE,
) -> Any:
    """Return a split of a Hugging Face dataset or of a folder with data files; downloads are cached by the library."""
    if is_path(dataset) and not Path(dataset).is_dir():
        problem = "is a file" if Path(dataset).exists() else f"does not exist (working folder: {Path.cwd()})"
        raise MisconfigurationException(
            f"dataset {dataset} {problem}: give a folder with data files, or a name on the hub"
        )
    with hub_errors(dataset, split, config, advice):
        from datasets import config as settings
        from datasets import load_dataset

        downloaded_before = settings.HF_HUB_OFFLINE and not streaming
        if not Path(dataset).exists() and not downloaded_before and not hub_answers():
            # Without this check, the library would retry for half a minute.
            raise ConnectionError("the Hugging Face hub does not answer; HF_HUB_OFFLINE=1 takes an earlier download")
        return load_dataset(dataset, config, split=split, revision=revision, streaming=streaming)


@contextmanager
def hub_errors(dataset: str, split: str, config: str | None = None, advice: str = ADVICE) -> Iterator[None]:
    """Raise any error in the block with a message of one line that names the dataset; a stream may fail late."""
    try:
        yield
    except MisconfigurationException:
        raise
    except Exception as error:  # the hub, the network and the file formats each have their own
        part = f"config {config}, split {split}" if config else f"split {split}"
        raise MisconfigurationException(
            f"dataset {dataset} ({part}) could not be read ({first_line(error)}): check its name and the network; "
            f"{advice}"
        ) from error
