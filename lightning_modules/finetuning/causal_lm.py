"""Fine-tuning of causal language models of Transformers, and generation with a cache."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_modules.base import ExperimentModule
from lightning_modules.finetuning.bases import architecture_of, check_fit, evaluating, load_pretrained, save_pretrained
from lightning_modules.metrics import CorpusLoss
from lightning_modules.models.generation import generate

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedModel


class FineTunedCausalLM(ExperimentModule):
    """Base of the modules that fine-tune a causal language model of Transformers: loading, generation and export.

    Args:
        base: Model to start from: a folder with `config.json` and weights, the folder of a run with such a folder
            `model/` in it, or a name on the hub (`openai-community/gpt2`).
        vocab_size: Number of tokens of the tokenizer; linked from the data.
        block_size: Length of a block, in tokens; linked from the data.
        architecture: Configuration of the model; leave it out. A checkpoint holds it, so that the module can be built
            without the base.

    Raises:
        MisconfigurationException: If the base cannot be loaded, or does not fit the data.
    """

    def __init__(
        self,
        base: str,
        vocab_size: int | None = None,
        block_size: int | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        vocab_size, block_size = self.linked(vocab_size=vocab_size, block_size=block_size)
        self.model = load_pretrained(base, architecture=architecture)
        check_fit(self.model, base, vocab_size, block_size)
        self.save_hyperparameters()
        self.hparams["architecture"] = architecture_of(self.model)
        self.track(CorpusLoss())

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Continue token ids of shape (B, T), one step of shape (B,) at a time; see `models.generation.generate`."""
        with evaluating(self.model):
            yield from generate(CachedHubModel(self.model), input_ids, max_new_tokens, **sampling)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model in Transformers' format: `config.json` and `model.safetensors`."""
        save_pretrained(self.model, folder)


class CachedHubModel:
    """Adapter of a causal language model of Transformers to the interface `models.generation.CachedModel`."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.training = model.training
        context = getattr(model.config, "max_position_embeddings", None) or torch.iinfo(torch.int64).max
        self.config = SimpleNamespace(vocab_size=model.config.vocab_size, block_size=context)

    def new_cache(self) -> list["HubCache"]:
        """Return a list with an empty cache for all layers; our decoder has a cache for each layer."""
        return [HubCache(self.model.config)]

    def __call__(self, input_ids: Tensor, *, cache: list["HubCache"], last_only: bool = True) -> Tensor:
        """Return the scores of the token after the last: (B, T) to (B, 1, V)."""
        return self.model(input_ids, past_key_values=cache[0].past, use_cache=True).logits[:, -1:]


class HubCache:
    """Cache of the keys and values of the tokens that a model of Transformers has read."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.clear()

    @property
    def length(self) -> int:
        """Number of positions read."""
        return self.past.get_seq_length()

    def clear(self) -> None:
        """Remove all positions."""
        from transformers import DynamicCache

        self.past = DynamicCache(config=self.config)
