"""Pretrained models of Transformers: loading, saving, checking them against the data, and scoring with them."""

import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.common.hub import hub_answers
from lightning_modules.common.messages import say

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedModel

Batch = TypeVar("Batch")


def load_pretrained(
    base: str, auto_class: str = "AutoModelForCausalLM", architecture: dict[str, Any] | None = None, **changes: Any
) -> "PreTrainedModel":
    """Loads a model in float32 and in training mode.

    Args:
        base: A folder with `config.json` and weights, a run folder with such a folder `model/` in it, or a hub name.
        auto_class: Class of Transformers that knows which model is meant: the head that it gets.
        architecture: What `architecture_of` said of a model. It is then built without looking at `base`, its weights
            drawn at random: those of a checkpoint are to follow.
        **changes: Fields of the model's configuration to set, such as `num_labels`.

    Raises:
        MisconfigurationException: If there is no such model, or it is of another kind.
    """
    import transformers

    auto = getattr(transformers, auto_class)
    if architecture is not None:
        config = transformers.AutoConfig.for_model(**architecture | changes)
        return auto.from_config(config).float().train()
    folder = _folder_of(base)
    try:
        on_disk = folder is not None or not hub_answers()
        with _quietly():
            config = transformers.AutoConfig.from_pretrained(folder or base, local_files_only=on_disk, **changes)
            model, found = auto.from_pretrained(
                folder or base,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=on_disk,
                adapter_kwargs={"local_files_only": on_disk},  # else it looks on the hub for adapters all the same
            )
    # A missing file, an unknown architecture, a broken config.json; weights that would run code when they are read.
    except (OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        where = (
            "" if folder else ", which is no local folder, from the Hugging Face hub: check the name and the network"
        )
        raise MisconfigurationException(
            f"model.base: {auto_class} could not load {base}{where} ({str(error).strip().splitlines()[0]})"
        ) from error
    if missing := sorted(found["missing_keys"]):
        say(f"{base} has no {', '.join(missing)}: drawn at random")
    return model.train()  # from_pretrained gives it in evaluation mode, and Lightning leaves it as it is


def save_pretrained(model: "PreTrainedModel", folder: Path) -> None:
    """Writes a model in Transformers' format: `config.json` and `model.safetensors`.

    Args:
        model: Any model of Transformers.
        folder: Folder to make.
    """
    with _quietly():
        model.save_pretrained(folder)


@contextmanager
def _quietly() -> Iterator[None]:
    """Transformers shows a progress bar for files of any size, and a table of the weights that a model has not."""
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _folder_of(base: str) -> Path | None:
    """The local folder that is meant, or nothing where it is the name of a model on the hub."""
    path = Path(base).expanduser()
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "config.json").is_file():
        return path
    if path.exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
        problem = "holds no config.json, nor a model/ that does" if path.exists() else "does not exist"
        run = re.search(r"\bruns/([^/]+)/([^/]+)", path.as_posix())
        advice = f"; `llm-train fit -c experiments/{run[1]}/{run[2]}.yaml` makes one" if run else ""
        raise MisconfigurationException(
            f"model.base: {base} {problem}: give a folder with config.json and model.safetensors, the folder of a "
            f"finished run, or a hub name{advice}"
        )
    return None


def architecture_of(model: "PreTrainedModel") -> dict[str, Any]:
    """The configuration from which `load_pretrained` builds the same model without its base, in plain types.

    Args:
        model: Any model of Transformers.
    """
    return json.loads(model.config.to_json_string(use_diff=False))


def check_fit(model: "PreTrainedModel", base: str, vocab_size: int, block_size: int) -> None:
    """Refuses data that the model cannot read.

    Args:
        model: Any model of Transformers.
        base: Where it is from.
        vocab_size: Number of tokens of the tokenizer.
        block_size: Tokens in the longest sequence.

    Raises:
        MisconfigurationException: If the model has fewer tokens, or a shorter context.
    """
    if vocab_size > model.config.vocab_size:
        raise MisconfigurationException(
            f"data.tokenizer: it has {vocab_size} tokens, more than the {model.config.vocab_size} of {base}; give the "
            "tokenizer that this model was trained with"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and block_size > context:
        raise MisconfigurationException(
            f"data.block_size: {block_size} is longer than the context of {base}, {context} tokens"
        )


@contextmanager
def scored_at(model: "PreTrainedModel", places: Tensor) -> Iterator[None]:
    """Within the context, the model's output layer scores some places alone: (B, T, C) becomes (N, V).

    The scores are the largest tensor of all, V numbers a token, and most places need none.

    Args:
        model: Any model of Transformers with an output layer.
        places: Which places, (B, T) bool, N of them true.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][places],))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context a model is in evaluation mode.

    Args:
        model: Any module.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def scores_of_share(forward: Callable[[Batch], Tensor], batch: Batch, rows: Tensor, *shape: int) -> Tensor:
    """Return the scores of a batch, or empty scores if this process has no share of it.

    On several processes some have no share of the last batch of an evaluation, and most models of Transformers fail
    on a batch without rows.

    Args:
        forward: Maps the batch to its scores, such as the module itself.
        batch: Argument of `forward`.
        rows: A tensor of the batch whose first dimension is that of the batch, (B, ...).
        *shape: Dimensions of empty scores after the first, which is 0.
    """
    return forward(batch) if len(rows) else torch.zeros(0, *shape, device=rows.device)
