"""An encoder that is pretrained on masked tokens: a new BERT, or any encoder of Transformers trained further."""

from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_modules.base import CompileMode, ExperimentModule, Loss
from lightning_modules.common.ranges import PositiveInt, Probability
from lightning_modules.common.targets import IGNORED
from lightning_modules.finetuning.bases import (
    architecture_of,
    as_mask,
    attends_within_records,
    check_fit,
    check_tokenizer,
    load_pretrained,
    save_pretrained,
)
from lightning_modules.finetuning.output_layer import OutputLayer
from lightning_modules.metrics import CorpusLoss

Batch = dict[str, Tensor]


class BertMaskedLMModule(ExperimentModule):
    """An encoder that learns to predict masked tokens.

    The loss of a batch is the sum over its masked tokens, divided by the mean number of masked tokens in a batch of
    that size. So a token has the same weight in a batch of short reviews and in one of long reviews, and on any
    number of processes.

    A batch is a dictionary with `input_ids`, `attention_mask` and `targets`, (B, T) int64, where a target is `IGNORED`
    if its token is not predicted; `places`, the positions of the targets in these B T, (N,) int64, see
    `common.targets`; and `mean_targets`, the mean number of targets of B reviews, a scalar.

    Args:
        base: Encoder to train further: a folder, the folder of a run, `package:NAME` for a model that an installed
            package carries, or a name on the hub; `null` creates a new BERT.
        n_layer: Number of layers of the new BERT.
        n_head: Number of attention heads of the new BERT; a divisor of `n_embd`.
        n_embd: Width C of the new BERT. The hidden layer of a block is four times as wide.
        dropout: Dropout of the new BERT, in [0, 1).
        vocab_size: Number of tokens; linked from the data.
        block_size: Number of tokens in the longest row; linked from the data.
        pad_token_id: Token that pads a row; linked from the data.
        architecture: Configuration of the model; leave it out. A checkpoint holds it, so that the model can be built
            without the base.

    Raises:
        MisconfigurationException: If the base is not an encoder or does not fit the data, or `n_head` does not divide
            `n_embd`.
    """

    varying_sizes: ClassVar = {"input_ids": 1, "attention_mask": 1, "targets": 1, "places": 0}
    settings_of_next = ("data.reviews", "data.max_tokens")
    within_records = False  # whether the attention takes the ends of the reviews, `cu_seqlens`, in place of a mask

    def __init__(
        self,
        base: str | None = None,
        n_layer: PositiveInt = 4,
        n_head: PositiveInt = 4,
        n_embd: PositiveInt = 128,
        dropout: Probability = 0.1,
        vocab_size: int | None = None,
        block_size: int | None = None,
        pad_token_id: int | None = None,
        architecture: dict[str, Any] | None = None,
        compile: CompileMode = False,
    ) -> None:
        super().__init__(compile)
        vocab_size, block_size = self.linked(vocab_size=vocab_size, block_size=block_size)
        if n_embd % n_head:
            raise MisconfigurationException(f"model.n_head: {n_head} does not divide n_embd, {n_embd}")
        if base is None and architecture is None:
            architecture = {
                "model_type": "bert",
                "vocab_size": vocab_size,
                "hidden_size": n_embd,
                "num_hidden_layers": n_layer,
                "num_attention_heads": n_head,
                "intermediate_size": 4 * n_embd,
                "max_position_embeddings": block_size,
                "hidden_dropout_prob": dropout,
                "attention_probs_dropout_prob": dropout,
                "pad_token_id": pad_token_id,
            }
        name = base or "a new BERT"
        self.model = load_pretrained(name, "AutoModelForMaskedLM", architecture)
        check_fit(self.model, name, vocab_size, block_size, argument="data.max_tokens")
        self.save_hyperparameters()
        self.hparams["architecture"] = architecture_of(self.model)
        self.output_layer = OutputLayer(self.model)
        self.track(CorpusLoss())

    def before_compilation(self) -> None:
        """Find the output layer."""
        self.output_layer.prepare()

    def setup(self, stage: str) -> None:
        """Let the model attend within the reviews by a kernel without a mask, on a GPU; compare the vocabularies."""
        if stage == "fit":
            check_tokenizer(self.model, self.hparams["base"], self._data)
        self.within_records = attends_within_records(self.trainer, self.model)

    def loss(self, batch: Batch) -> Loss:
        """Return the loss of a batch; `train/loss` is the mean over its targets, in nats a token."""
        nats = self.output_layer.cross_entropy(**self._arguments(batch), reduction="sum")
        n_targets = (batch["targets"] != IGNORED).sum()
        return Loss(nats / batch["mean_targets"], nats / n_targets.clamp_min(1), n_targets)

    def evaluation_step(self, batch: Batch, metrics: CorpusLoss) -> None:
        """Update the metrics with the targets of a batch, which may be empty."""
        metrics.update(self.output_layer.nats_of_share(**self._arguments(batch)), batch["targets"])

    def _arguments(self, batch: Batch) -> Batch:
        """Return the arguments of `OutputLayer.cross_entropy`: targets and their places, and those of the model."""
        mask = as_mask(batch["cu_seqlens"]) if self.within_records else batch["attention_mask"]
        return {name: batch[name] for name in ("targets", "places", "input_ids")} | {"attention_mask": mask}

    def next_command(self, run: str) -> str:
        """Return the command that trains a classifier on this encoder, or one that validates it without labels."""
        if not getattr(self._data, "have_labels", True):
            return super().next_command(run)
        # An encoder that was pretrained before needs a lower learning rate than a small one that is new.
        experiment = getattr(self._data, "tuned_by", "classify") if self.hparams["base"] else "offline"
        return f"llm-train fit -c bert_imdb/{experiment} --model.base {run} --data.tokenizer {run}/tokenizer"

    def save_pretrained(self, folder: Path) -> None:
        """Write the model in the format of Transformers; `AutoModel` loads its encoder."""
        save_pretrained(self.model, folder)
