"""Pretraining of the decoder: predict the next token of running text."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.base import CompileMode, ExperimentModule
from lightning_modules.common.files import read_json, write_json
from lightning_modules.common.messages import first_line, say
from lightning_modules.common.ranges import PositiveFloat, PositiveInt, Probability
from lightning_modules.finetuning.bases import check_fit, check_sizes, in_evaluation_mode, load_pretrained, local_folder
from lightning_modules.metrics import CorpusLoss
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.feed_forward import FeedForwardName
from lightning_modules.models.formats import OWN_MODEL_TYPE, exported, imported
from lightning_modules.models.generation import generate
from lightning_modules.models.initialization import INITIALIZATIONS, InitializationName
from lightning_modules.models.linear_cross_entropy import linear_cross_entropy
from lightning_modules.models.norms import NormName
from lightning_modules.models.positions import PositionsName

Batch = dict[str, Tensor]  # input_ids and targets, (B, T) int64; target_bytes, a scalar


class PretrainModule(ExperimentModule):
    """The decoder of `lightning_modules.models.decoder`, trained to predict the next token (Radford et al., 2019).

    Args:
        vocab_size: Number of tokens; linked from the data.
        block_size: Context length, in tokens; linked from the data.
        n_layer: Number of blocks.
        n_head: Number of attention heads in a block; divides `n_embd`.
        n_embd: Width of the residual stream.
        n_kv_head: Number of heads of keys and values; divides `n_head`. `null` means `n_head`.
        positions: `learned` (a table) or `rotary` (queries and keys are rotated).
        norm: `layer`, `rms`, or `rms_unweighted` (RMSNorm without weights).
        feed_forward: `gelu`, `relu2` or `swiglu`; all have about the same number of weights.
        qk_norm: Whether queries and keys are normalised.
        embedding_norm: Whether the embeddings are normalised before the first block.
        value_embeddings: Whether every block adds an embedding of the token to its values.
        tied_embeddings: Whether the output matrix is the token embedding.
        logit_soft_cap: Bound of the absolute values of the logits (above 0). `null` means no bound.
        norm_eps: The epsilon of the norms (above 0). `null` means 1e-5 for `layer` and 1e-6 for the others.
        rotary_base: Base of the angles of rotary positions (above 0).
        dropout: Probability of dropping a value of the embeddings, the attention weights and the residual branches in
            training (0 to less than 1).
        embedding_dropout: Dropout of the embeddings; `null` means `dropout`.
        attention_dropout: Dropout of the attention weights; `null` means `dropout`.
        residual_dropout: Dropout of what each half of a block adds to the residual stream; `null` means `dropout`.
        bias: Whether linear layers and norms have biases.
        attention: `fused` (torch's kernels) or `explicit` (each step of the formula written out; slower).
        initialization: Name of the weight initialisation; a function of `lightning_modules.models.initialization`.
        pretrained: Weights to start from, of GPT-2 or another class that `lightning_modules.models.formats` reads: a
            folder in Hugging Face's format, a run that has exported one, or a name on the hub. Its sizes and parts
            replace those above. `null` starts from the initialisation.
        vocab_multiple: Multiple to which the rows of the embedding are rounded up, for the matrix units of a GPU (64 is
            usual). The rows added are no tokens of the tokenizer; a model that has trained little may generate them.
        architecture: Configuration of a decoder that started from `pretrained`; leave it out. A checkpoint holds it, so
            that the decoder can be built without the pretrained weights.

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
        n_kv_head: PositiveInt | None = None,
        positions: PositionsName = "learned",
        norm: NormName = "layer",
        feed_forward: FeedForwardName = "gelu",
        qk_norm: bool = False,
        embedding_norm: bool = False,
        value_embeddings: bool = False,
        tied_embeddings: bool = True,
        logit_soft_cap: PositiveFloat | None = None,
        norm_eps: PositiveFloat | None = None,
        rotary_base: PositiveFloat = 10_000.0,
        dropout: Probability = 0.0,
        embedding_dropout: Probability | None = None,
        attention_dropout: Probability | None = None,
        residual_dropout: Probability | None = None,
        bias: bool = True,
        attention: Literal["fused", "explicit"] = "fused",
        initialization: InitializationName = "gpt2",
        pretrained: str | None = None,
        vocab_multiple: PositiveInt = 1,
        compile: CompileMode = False,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        arguments = dict(locals())  # `hparams` has those of a subclass in place of what it passes on
        super().__init__(compile)
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
            if pretrained is not None and architecture is not None:
                self.decoder = Decoder(DecoderConfig(**architecture | common))
            elif pretrained is None:
                n_rows = -(-vocab_size // vocab_multiple) * vocab_multiple
                parts = {field.name: arguments[field.name] for field in fields(DecoderConfig)}
                self.decoder = Decoder(DecoderConfig(**parts | common | {"vocab_size": n_rows}))
                INITIALIZATIONS[initialization](self.decoder)
            else:
                self.decoder = load_decoder(pretrained, vocab_size, **common)
                self.hparams["architecture"] = asdict(self.decoder.config)
                if replaced := _replaced(arguments, self.decoder.config):
                    say(f"pretrained: the model has {', '.join(replaced)}")
        except (TypeError, ValueError) as error:  # the architecture can be a damaged file's
            raise MisconfigurationException(f"model: {error}") from error
        self.flops_per_token = self.decoder.flops_per_token()
        self.track(CorpusLoss())

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the scores of the next token: (B, T) to (B, T, V)."""
        return self.decoder(input_ids)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the targets of a batch."""
        return self._cross_entropy(batch, "mean")

    def evaluation_step(self, batch: Batch, metrics: CorpusLoss) -> None:
        """Update the loss of the validation or test text with a batch."""
        metrics.update(self._cross_entropy(batch, "none"), batch["targets"], batch["target_bytes"])

    def _cross_entropy(self, batch: Batch, reduction: Literal["mean", "none"]) -> Tensor:
        return linear_cross_entropy(
            self.decoder.hidden_states(batch["input_ids"]),
            self.decoder.output_weight,
            batch["targets"],
            soft_cap=self.decoder.config.logit_soft_cap,
            reduction=reduction,
        )

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Iterator[Tensor]:
        """Continue token ids of shape (B, T), one step of shape (B,) at a time; see `models.generation.generate`."""
        with in_evaluation_mode(self.decoder):
            yield from generate(self.decoder, input_ids, max_new_tokens, **sampling)

    def next_command(self, run: str) -> str:
        """Return the command that generates text with the model of a run."""
        return f'llm-train generate --run {run} --prompt "The"'

    def save_pretrained(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` for Transformers, or in our own format if it has no class.

        Raises:
            MisconfigurationException: If a subclass has put modules of its own into the decoder.
        """
        from safetensors.torch import save_file

        try:
            config, state, reason = exported(self.decoder)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if reason:
            say(f"export: {reason}; --model.pretrained reads the exported model, AutoModelForCausalLM does not")
        folder.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", config)


def _replaced(arguments: dict[str, Any], config: DecoderConfig) -> list[str]:
    """Return the sizes and parts that a pretrained decoder has in place of those that were given, in words."""
    defaults = signature(PretrainModule).parameters
    names = (field.name for field in fields(config) if field.name in arguments and field.name != "vocab_size")
    return [
        f"{name}={own} in place of {given}"
        for name in names
        if (given := arguments[name]) not in (own := getattr(config, name), defaults[name].default)
    ]


def load_decoder(pretrained: str, vocab_size: int, block_size: int, **changes: Any) -> Decoder:
    """Return a decoder with the weights of a folder or of a model on the hub.

    Args:
        pretrained: What `load_pretrained` accepts, such as a folder with `config.json` and weights.
        vocab_size: Number of tokens of the tokenizer; the decoder keeps all rows of the embedding.
        block_size: Context length, in tokens; the embeddings of later positions are dropped.
        **changes: Further fields of `DecoderConfig` to set, such as `attention`.

    Raises:
        MisconfigurationException: If there is no such model, it is damaged, or its vocabulary or context is smaller.
        ValueError: If our decoder has not the parts of the model.
    """
    folder = local_folder(pretrained, "model.pretrained")
    own = {} if folder is None else read_json(folder / "config.json", {})
    if folder is not None and own.get("model_type") == OWN_MODEL_TYPE:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            check_sizes(own["vocab_size"], own["block_size"], pretrained, vocab_size, block_size)
            return imported(own, load_file(folder / "model.safetensors"), block_size, **changes)
        # A field or a file is missing, or the weights are damaged or do not fit.
        except (KeyError, OSError, RuntimeError, SafetensorError) as error:
            raise MisconfigurationException(
                f"model.pretrained: {pretrained} could not be loaded ({first_line(error)}): make or download it again"
            ) from error
    model = load_pretrained(pretrained, argument="model.pretrained")
    check_fit(model, pretrained, vocab_size, block_size)
    return imported(model.config.to_dict(), model.state_dict(), block_size, **changes)
