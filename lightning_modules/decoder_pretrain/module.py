"""Pretraining the decoder: predict the next token of running text."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.base import ExperimentModule
from lightning_modules.common.hub import hub_answers
from lightning_modules.metrics import CorpusLoss, next_token_loss
from lightning_modules.models import gpt2_format
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.generation import generate
from lightning_modules.models.initialization import INITIALIZATIONS, InitializationName

Batch = dict[str, Tensor]


class PretrainModule(ExperimentModule):
    """The decoder of `models/decoder.py`, trained on the next token (Radford et al., 2019).

    Args:
        vocab_size: Number of tokens; linked from the data.
        block_size: Context length, in tokens; linked from the data.
        n_layer: Number of blocks.
        n_head: Attention heads a block; divides `n_embd`.
        n_embd: Width of the residual stream.
        dropout: Share of embeddings, attention weights and residual branches dropped in training (0 to 1).
        embedding_dropout: Share of the embeddings alone; `null` takes `dropout`.
        attention_dropout: Share of the attention weights alone; `null` takes `dropout`.
        residual_dropout: Share of what each half of a block adds to the residual stream; `null` takes `dropout`.
        bias: Whether linear layers and norms have biases.
        attention: `fused` (torch's kernels) or `explicit` (every step of the formula written out; slower).
        initialization: How the weights are drawn; a function of `models/initialization.py`.
        pretrained: GPT-2 weights to start from: a folder or a hub name, whose sizes then replace the ones above;
            `null` starts from the initialisation.
        vocab_multiple: Rounds the rows of the embedding up to a multiple, for the GPU's matrix units (64 is usual).
        compile: Whether `torch.compile` fuses the decoder; costs about a minute at the start.

    Raises:
        MisconfigurationException: If the sizes do not fit each other, or the pretrained weights.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        block_size: int | None = None,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        embedding_dropout: float | None = None,
        attention_dropout: float | None = None,
        residual_dropout: float | None = None,
        bias: bool = True,
        attention: Literal["fused", "explicit"] = "fused",
        initialization: InitializationName = "gpt2",
        pretrained: str | None = None,
        vocab_multiple: int = 1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if vocab_size is None or block_size is None:
            raise MisconfigurationException(
                "model: vocab_size and block_size are needed; the data gives them, or you do"
            )
        dropouts = {
            "embedding_dropout": dropout if embedding_dropout is None else embedding_dropout,
            "attention_dropout": dropout if attention_dropout is None else attention_dropout,
            "residual_dropout": dropout if residual_dropout is None else residual_dropout,
        }
        try:
            if pretrained is None:
                config = DecoderConfig(
                    vocab_size=-(-vocab_size // vocab_multiple) * vocab_multiple,
                    block_size=block_size,
                    n_layer=n_layer,
                    n_head=n_head,
                    n_embd=n_embd,
                    bias=bias,
                    attention=attention,
                    **dropouts,
                )
                self.decoder = Decoder(config)
                INITIALIZATIONS[initialization](self.decoder)
            else:
                self.decoder = load_gpt2(pretrained, block_size, attention, **dropouts)
        except ValueError as error:
            raise MisconfigurationException(f"model: {error}") from error
        if vocab_size > self.decoder.config.vocab_size:
            raise MisconfigurationException(
                f"model: the tokenizer has {vocab_size} tokens, more than the {self.decoder.config.vocab_size} of "
                f"{pretrained}; use the tokenizer that these weights were trained with"
            )
        if compile:
            self.decoder.compile()
        self.flops_per_token = self.decoder.flops_per_token()
        self.val_measures = CorpusLoss()
        self.test_measures = CorpusLoss()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scores of the next token: (B, T) to (B, T, V)."""
        return self.decoder(input_ids)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch's targets."""
        loss = next_token_loss(self(batch["input_ids"]), batch["targets"])
        self.log_train_loss(loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the measures of the validation text."""
        self.val_measures.update(self(batch["input_ids"]), batch["targets"], batch["target_bytes"])

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/perplexity` and `val/bits_per_byte`."""
        self._log_measures("val", self.val_measures)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the measures of the test text."""
        self.test_measures.update(self(batch["input_ids"]), batch["targets"], batch["target_bytes"])

    def on_test_epoch_end(self) -> None:
        """Logs `test/loss`, `test/perplexity` and `test/bits_per_byte`."""
        self._log_measures("test", self.test_measures)

    def _log_measures(self, split: str, measures: CorpusLoss) -> None:
        # The measures are already those of all ranks; sync_dist only tells Lightning that they are the same everywhere.
        self.log_dict({f"{split}/{name}": value for name, value in measures.compute().items()}, sync_dist=True)
        measures.reset()

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Continues token ids of shape (B, T), one step of shape (B,) at a time; see `models.generation.generate`."""
        training = self.decoder.training
        self.decoder.eval()
        try:
            yield from generate(self.decoder, input_ids, max_new_tokens, **sampling)
        finally:
            self.decoder.train(training)

    def next_command(self, run: str) -> str:
        """Read what the model writes."""
        return f'llm-train generate --run {run} --prompt "The"'

    def save_pretrained(self, folder: Path) -> None:
        """Writes the decoder as Transformers' GPT-2: `config.json` and `model.safetensors`.

        Args:
            folder: Folder to make.
        """
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        state = gpt2_format.to_gpt2_state_dict(self.decoder)
        del state["lm_head.weight"]  # the token embedding again; a safetensors file holds each tensor once
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = gpt2_format.gpt2_config(self.decoder.config)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_gpt2(
    pretrained: str,
    block_size: int,
    attention: Literal["fused", "explicit"] = "fused",
    embedding_dropout: float = 0.0,
    attention_dropout: float = 0.0,
    residual_dropout: float = 0.0,
) -> Decoder:
    """Builds our decoder from GPT-2 weights in Hugging Face's format.

    Args:
        pretrained: A folder with `config.json` and weights, or a name on the hub.
        block_size: Context length; positions beyond it are cropped.
        attention: `fused` or `explicit`.
        embedding_dropout: Share of the embeddings dropped in training (0 to 1).
        attention_dropout: Share of the attention weights dropped in training (0 to 1).
        residual_dropout: Share of what each half of a block adds that is dropped in training (0 to 1).

    Raises:
        MisconfigurationException: If there is no such model, it is no GPT-2, or its context is shorter.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    try:
        if Path(pretrained).is_dir() and not (Path(pretrained) / "config.json").is_file():
            raise OSError(f"{pretrained} has no config.json")
        on_disk = Path(pretrained).is_dir() or not hub_answers()
        hub_config = GPT2Config.from_pretrained(pretrained, local_files_only=on_disk)
        model = GPT2LMHeadModel.from_pretrained(pretrained, dtype=torch.float32, local_files_only=on_disk)
    except (OSError, pickle.UnpicklingError) as error:
        raise MisconfigurationException(
            f"model.pretrained: {pretrained!r} could not be loaded ({str(error).splitlines()[0]}); "
            "give a folder with config.json and model.safetensors; offline.yaml needs none"
        ) from error
    config = replace(
        gpt2_format.decoder_config_from_gpt2(hub_config.to_dict()),
        block_size=block_size,
        attention=attention,
        embedding_dropout=embedding_dropout,
        attention_dropout=attention_dropout,
        residual_dropout=residual_dropout,
    )
    if block_size > hub_config.n_positions:
        raise MisconfigurationException(
            f"data.block_size: {block_size} is longer than the context of {pretrained}, {hub_config.n_positions}"
        )
    decoder = Decoder(config)
    decoder.load_state_dict(gpt2_format.from_gpt2_state_dict(model.state_dict(), config))
    return decoder
