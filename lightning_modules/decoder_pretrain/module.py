"""Pretraining of the decoder: predict the next token of running text."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.base import ExperimentModule
from lightning_modules.common.files import write_text
from lightning_modules.common.ranges import PositiveInt, Probability
from lightning_modules.finetuning.bases import check_fit, evaluating, load_pretrained
from lightning_modules.metrics import CorpusLoss, next_token_loss
from lightning_modules.models import gpt2_format
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.generation import generate
from lightning_modules.models.initialization import INITIALIZATIONS, InitializationName

Batch = dict[str, Tensor]  # input_ids and targets, (B, T) int64; target_bytes, a scalar


class PretrainModule(ExperimentModule):
    """The decoder of `lightning_modules.models.decoder`, trained to predict the next token (Radford et al., 2019).

    Args:
        vocab_size: Number of tokens; linked from the data.
        block_size: Context length, in tokens; linked from the data.
        n_layer: Number of blocks.
        n_head: Number of attention heads in a block; divides `n_embd`.
        n_embd: Width of the residual stream.
        dropout: Probability of dropping a value of the embeddings, the attention weights and the residual branches in
            training (0 to less than 1).
        embedding_dropout: Dropout of the embeddings; `null` means `dropout`.
        attention_dropout: Dropout of the attention weights; `null` means `dropout`.
        residual_dropout: Dropout of what each half of a block adds to the residual stream; `null` means `dropout`.
        bias: Whether linear layers and norms have biases.
        attention: `fused` (torch's kernels) or `explicit` (each step of the formula written out; slower).
        initialization: Name of the weight initialisation; a function of `lightning_modules.models.initialization`.
        pretrained: GPT-2 weights to start from: a folder in Hugging Face's format, a run that has exported one, or a
            name on the hub. Its sizes replace the sizes above. `null` starts from the initialisation.
        vocab_multiple: Multiple to which the rows of the embedding are rounded up, for the matrix units of a GPU (64 is
            usual).
        compile: Whether to compile the decoder with `torch.compile`; takes about a minute at the start.

    Raises:
        MisconfigurationException: If the sizes do not fit each other or the pretrained weights.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        block_size: int | None = None,
        n_layer: PositiveInt = 12,
        n_head: PositiveInt = 12,
        n_embd: PositiveInt = 768,
        dropout: Probability = 0.0,
        embedding_dropout: Probability | None = None,
        attention_dropout: Probability | None = None,
        residual_dropout: Probability | None = None,
        bias: bool = True,
        attention: Literal["fused", "explicit"] = "fused",
        initialization: InitializationName = "gpt2",
        pretrained: str | None = None,
        vocab_multiple: PositiveInt = 1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        vocab_size, block_size = self.linked(vocab_size=vocab_size, block_size=block_size)
        common = {
            "block_size": block_size,
            "attention": attention,
            "embedding_dropout": dropout if embedding_dropout is None else embedding_dropout,
            "attention_dropout": dropout if attention_dropout is None else attention_dropout,
            "residual_dropout": dropout if residual_dropout is None else residual_dropout,
        }
        try:
            if pretrained is None:
                n_rows = -(-vocab_size // vocab_multiple) * vocab_multiple
                config = DecoderConfig(n_rows, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias, **common)
                self.decoder = Decoder(config)
                INITIALIZATIONS[initialization](self.decoder)
            else:
                self.decoder = load_gpt2(pretrained, vocab_size, **common)
        except ValueError as error:
            raise MisconfigurationException(f"model: {error}") from error
        if compile:
            self.decoder.compile()
        self.flops_per_token = self.decoder.flops_per_token()
        self.track(CorpusLoss())

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the scores of the next token: (B, T) to (B, T, V)."""
        return self.decoder(input_ids)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the targets of a batch."""
        loss = next_token_loss(self(batch["input_ids"]), batch["targets"])
        self.log_train_loss(loss)
        return loss

    def evaluation_step(self, batch: Batch, metrics: CorpusLoss) -> None:
        """Update the loss of the validation or test text with a batch."""
        metrics.update(self(batch["input_ids"]), batch["targets"], batch["target_bytes"])

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Continue token ids of shape (B, T), one step of shape (B,) at a time; see `models.generation.generate`."""
        with evaluating(self.decoder):
            yield from generate(self.decoder, input_ids, max_new_tokens, **sampling)

    def next_command(self, run: str) -> str:
        """Return the command that generates text with the model of a run."""
        return f'llm-train generate --run {run} --prompt "The"'

    def save_pretrained(self, folder: Path) -> None:
        """Write the decoder as a GPT-2 of Transformers: `config.json` and `model.safetensors`."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        state = gpt2_format.to_gpt2_state_dict(self.decoder)
        del state["lm_head.weight"]  # the token embedding again; a safetensors file holds each tensor once
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = gpt2_format.gpt2_config(self.decoder.config)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def load_gpt2(pretrained: str, vocab_size: int, block_size: int, **changes: Any) -> Decoder:
    """Return a decoder with GPT-2 weights in Hugging Face's format.

    Args:
        pretrained: What `load_pretrained` accepts, such as a folder with `config.json` and weights.
        vocab_size: Number of tokens of the tokenizer; the decoder keeps all rows of the embedding.
        block_size: Context length, in tokens; the embeddings of later positions are dropped.
        **changes: Further fields of `DecoderConfig` to set, such as `attention`.

    Raises:
        MisconfigurationException: If there is no such model, or its vocabulary or context is smaller.
        ValueError: If the model is not a GPT-2.
    """
    model = load_pretrained(pretrained, argument="model.pretrained")
    check_fit(model, pretrained, vocab_size, block_size)
    config = gpt2_format.decoder_config_from_gpt2(model.config.to_dict())
    config = replace(config, block_size=block_size, **changes)
    decoder = Decoder(config)
    decoder.load_state_dict(gpt2_format.from_gpt2_state_dict(model.state_dict(), config))
    return decoder
