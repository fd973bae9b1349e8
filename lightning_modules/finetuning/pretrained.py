"""Pretrained models of Transformers: loaded from wherever they are, checked against the data, made to write, tuned."""

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import ExperimentModule
from lightning_modules.common.hub import hub_answers
from lightning_modules.common.messages import say
from lightning_modules.metrics import CorpusLoss
from lightning_modules.models.generation import generate

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedModel


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


class CachedHubModel:
    """A causal language model of Transformers as `models.generation` reads it.

    Args:
        model: The model.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        context = getattr(model.config, "max_position_embeddings", None) or torch.iinfo(torch.int64).max
        self.config = SimpleNamespace(vocab_size=model.config.vocab_size, block_size=context)

    @property
    def training(self) -> bool:
        """Whether the model drops units out."""
        return self.model.training

    def new_cache(self) -> list["HubCache"]:
        """An empty cache: one for all layers, where our decoder has one for each."""
        return [HubCache(self.model.config)]

    def __call__(self, input_ids: Tensor, *, cache: list["HubCache"], last_only: bool = True) -> Tensor:
        """Scores of the token after the last: (B, T) to (B, 1, V)."""
        return self.model(input_ids, past_key_values=cache[0].past, use_cache=True).logits[:, -1:]


class HubCache:
    """Keys and values of what a model of Transformers has read.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.clear()

    @property
    def length(self) -> int:
        """Number of positions read."""
        return self.past.get_seq_length()

    def clear(self) -> None:
        """Forgets all of it."""
        from transformers import DynamicCache

        self.past = DynamicCache(config=self.config)


class FineTunedCausalLM(ExperimentModule):
    """What fine-tunings of a causal language model of Transformers share: where it starts, how it writes, its export.

    Args:
        base: Model to start from: a folder with `config.json` and weights, the folder of a run that has such a folder
            `model/` (`runs/decoder_pretrain/offline`), or a name on the hub (`openai-community/gpt2`).
        vocab_size: Number of tokens of the tokenizer; linked from the data.
        block_size: Length of a block, in tokens; linked from the data.
        architecture: Configuration of the model, which a checkpoint keeps, so that it can be loaded where its base is
            not; leave it out.

    Raises:
        MisconfigurationException: If the base cannot be loaded, or cannot read the data.
    """

    def __init__(
        self,
        base: str,
        vocab_size: int | None = None,
        block_size: int | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if vocab_size is None or block_size is None:
            raise MisconfigurationException(
                "model: vocab_size and block_size are needed; the data gives them, or you do"
            )
        self.model = load_pretrained(base, architecture=architecture)
        check_fit(self.model, base, vocab_size, block_size)
        self.save_hyperparameters()
        self.hparams["architecture"] = architecture_of(self.model)
        self.val_measures, self.test_measures = CorpusLoss(), CorpusLoss()

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Continues token ids of shape (B, T), one step of shape (B,) at a time; see `models.generation.generate`."""
        with evaluating(self.model):
            yield from generate(CachedHubModel(self.model), input_ids, max_new_tokens, **sampling)

    def save_pretrained(self, folder: Path) -> None:
        """Writes the model as Transformers takes it: `config.json` and `model.safetensors`.

        Args:
            folder: Folder to make.
        """
        save_pretrained(self.model, folder)
