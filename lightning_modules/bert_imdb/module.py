"""BERT on film reviews: pretrained by masked words, and taught to tell what a review thinks of a film."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import ExperimentModule
from lightning_modules.classification import ClassificationMeasures
from lightning_modules.common.targets import IGNORED
from lightning_modules.finetuning.pretrained import (
    architecture_of,
    check_fit,
    load_pretrained,
    save_pretrained,
    scored_at,
)
from lightning_modules.metrics import CorpusLoss

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]


class BertImdbModule(ExperimentModule):
    """Any encoder of Transformers with a pooling and a head on top, trained on labels.

    Which of its weights are trained is up to the callbacks of `lightning_modules.finetuning.freeze`: in their patterns
    the encoder is `model.encoder.*` and the head `model.head.*`.

    Args:
        base: Encoder to start from: a folder with `config.json` and weights, the folder of a run that has such a folder
            `model/` (`runs/bert_imdb/offline_pretrain`), or a name on the hub (`google-bert/bert-base-uncased`).
        pooling: What the head sees of a review: `cls`, the vector of its first token; `mean`, the mean of all; `both`.
        head: `linear`, or `mlp`: a tanh layer first. `cls` and `mlp` is the head of BERT, which keeps the weights of
            the base's pooler where it has one.
        dropout: Share of what enters the last layer that is dropped in training, in [0, 1).
        vocab_size: Number of tokens; linked from the data.
        block_size: Tokens in the longest review; linked from the data.
        classes: Names of the classes; linked from the data.
        architecture: Configuration of the encoder, which a checkpoint keeps, so that it can be loaded where its base is
            not; leave it out.

    Raises:
        MisconfigurationException: If the base is no encoder, or cannot read the data.
    """

    def __init__(
        self,
        base: str,
        pooling: Literal["cls", "mean", "both"] = "cls",
        head: Literal["linear", "mlp"] = "mlp",
        dropout: float = 0.1,
        vocab_size: int | None = None,
        block_size: int | None = None,
        classes: list[str] | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if vocab_size is None or block_size is None or classes is None:
            raise MisconfigurationException(
                "model: vocab_size, block_size and classes are needed; the data gives them, or you do"
            )
        if not 0 <= dropout < 1:
            raise MisconfigurationException(f"model.dropout is {dropout}: it must be in [0, 1)")
        from lightning_modules.bert_imdb.encoder_classifier import EncoderClassifier, EncoderClassifierConfig

        encoder = load_pretrained(base, "AutoModel", architecture)
        _require_encoder(encoder, base)
        check_fit(encoder, base, vocab_size, block_size)
        config = EncoderClassifierConfig(
            encoder=architecture_of(encoder),
            pooling=pooling,
            head=head,
            dropout=dropout,
            id2label=dict(enumerate(classes)),
            label2id={name: label for label, name in enumerate(classes)},
        )
        self.model = EncoderClassifier(config, encoder).train()
        self.save_hyperparameters()
        self.hparams["architecture"] = architecture_of(encoder)
        self.val_measures = ClassificationMeasures(len(classes))
        self.test_measures = ClassificationMeasures(len(classes))

    def features(self, batch: Batch) -> Tensor:
        """What the head sees of the reviews of a batch: (B, F)."""
        return self.model.features(batch["input_ids"], batch["attention_mask"])

    def forward(self, batch: Batch) -> Tensor:
        """Scores of the classes, (B, K), from tokens, or from features where the batch has them already."""
        return self.model.head(batch["features"] if "features" in batch else self.features(batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy of the labels."""
        loss = F.cross_entropy(self(batch).float(), batch["labels"])
        self.log_train_loss(loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the measures."""
        self._measure(self.val_measures, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/accuracy`, `val/f1`, `val/auroc` and `val/calibration_error`."""
        self._log_measures("val", self.val_measures)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the measures."""
        self._measure(self.test_measures, batch)

    def on_test_epoch_end(self) -> None:
        """Logs the same for the test."""
        self._log_measures("test", self.test_measures)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities of the classes, (B, K), and the positions of the reviews, (B,)."""
        return {"probabilities": self._scores(batch).softmax(-1), "positions": batch["positions"]}

    def _scores(self, batch: Batch) -> Tensor:
        # A process may have no share of the last batch, and Transformers would trip over it.
        n = len(batch["positions"])
        return self(batch).float() if n else torch.zeros(0, len(self.hparams["classes"]), device=self.device)

    def _measure(self, measures: ClassificationMeasures, batch: Batch) -> None:
        measures.update(self._scores(batch), batch["labels"], batch["positions"])

    def _log_measures(self, split: str, measures: ClassificationMeasures) -> None:
        # Already those of all ranks; sync_dist only tells Lightning that they are the same everywhere.
        self.log_dict({f"{split}/{name}": value for name, value in measures.compute().items()}, sync_dist=True)
        with measures.sync_context():
            self.predictions = tuple(part.cpu() for part in measures.predictions())  # for callbacks
        measures.reset()

    def next_command(self, run: str) -> str:
        """Ask what it thinks of a review."""
        return f'llm-train predict -c {run}/config.yaml --ckpt_path best --data.text "I would see it again."'

    def save_pretrained(self, folder: Path) -> None:
        """Writes the model as Transformers takes it, with the names of the classes.

        BERT with its own head becomes a `BertForSequenceClassification`. There is no such class for other encoders,
        poolings and heads: they are saved with their code, and load with `trust_remote_code=True`.

        Args:
            folder: Folder to make.
        """
        config = self.model.config
        if (self.model.encoder.config.model_type, config.pooling, config.head) == ("bert", "cls", "mlp"):
            save_pretrained(_as_bert(self.model), folder)
            return
        for part, auto_class in ((config, "AutoConfig"), (self.model, "AutoModelForSequenceClassification")):
            type(part).register_for_auto_class(auto_class)
        save_pretrained(self.model, folder)


def _require_encoder(model: "PreTrainedModel", base: str) -> None:
    """Refuses a model that reads in one direction, or no text: an encoder is what can fill in masked words."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config = model.config
    if (
        type(config) not in MODEL_FOR_MASKED_LM_MAPPING
        or config.is_encoder_decoder
        or getattr(config, "is_decoder", False)
    ):
        raise MisconfigurationException(
            f"model.base: {base} holds a {type(model).__name__}, which is no encoder: give a model such as BERT, whose "
            "tokens see the text on both sides"
        )


def _as_bert(model: nn.Module) -> "PreTrainedModel":
    """The same model as Transformers' own class has it."""
    from transformers import AutoConfig, BertForSequenceClassification

    config = AutoConfig.for_model(**architecture_of(model.encoder))
    config.id2label, config.label2id = model.config.id2label, model.config.label2id
    config.classifier_dropout = model.config.dropout
    bert = BertForSequenceClassification(config)
    parts = (("bert.", model.encoder), ("bert.pooler.dense.", model.head.dense), ("classifier.", model.head.out))
    bert.load_state_dict({f"{name}{key}": v for name, part in parts for key, v in part.state_dict().items()})
    return bert


class BertMaskedLMModule(ExperimentModule):
    """An encoder that learns to fill in masked words: a new, small BERT, or any encoder trained further.

    The loss of a batch is the sum over its masked tokens, divided by how many a batch of so many reviews has on
    average: so a token has the same weight in a batch of short reviews and of long ones, on one process or on eight.

    Args:
        base: Encoder to train further: a folder, the folder of a run, or a name on the hub; `null` makes a new BERT.
        n_layer: Layers of the new one, at least 1.
        n_head: Heads of its attention; they divide `n_embd`.
        n_embd: Length of its vectors. Four times that is the hidden layer of a block.
        dropout: Its dropout, in [0, 1).
        vocab_size: Number of tokens; linked from the data.
        block_size: Tokens in the longest row; linked from the data.
        pad_token_id: Token that fills up a row; linked from the data.
        architecture: Configuration of the model, which a checkpoint keeps, so that it can be loaded where its base is
            not; leave it out.

    Raises:
        MisconfigurationException: If the base is no encoder or cannot read the data, or the sizes do not fit.
    """

    def __init__(
        self,
        base: str | None = None,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        dropout: float = 0.1,
        vocab_size: int | None = None,
        block_size: int | None = None,
        pad_token_id: int | None = None,
        architecture: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if vocab_size is None or block_size is None:
            raise MisconfigurationException(
                "model: vocab_size and block_size are needed; the data gives them, or you do"
            )
        if n_layer < 1 or n_head < 1 or n_embd < 1 or n_embd % n_head or not 0 <= dropout < 1:
            raise MisconfigurationException(
                f"model: n_layer {n_layer}, n_head {n_head} and n_embd {n_embd} must be at least 1, n_head divide "
                f"n_embd, and dropout {dropout} be in [0, 1)"
            )
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
        self.model = load_pretrained(base or "a new BERT", "AutoModelForMaskedLM", architecture)
        check_fit(self.model, base or "a new BERT", vocab_size, block_size)
        self.save_hyperparameters()
        self.hparams["architecture"] = architecture_of(self.model)
        self.val_measures = CorpusLoss()
        self.test_measures = CorpusLoss()

    def forward(self, batch: Batch) -> Tensor:
        """Scores at those N places of a batch that are to be predicted: (N, V)."""
        with scored_at(self.model, batch["targets"] != IGNORED):
            return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the masked tokens; what is logged is their mean, in nats a token."""
        targets = batch["targets"][batch["targets"] != IGNORED]
        nats = F.cross_entropy(self(batch).float(), targets, reduction="sum")
        self.log_train_loss(nats / max(1, len(targets)), len(targets))
        return nats / batch["mean_targets"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the masked tokens of a batch to the measures."""
        self._measure(self.val_measures, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, in nats a masked token, and `val/perplexity`."""
        self._log_measures("val", self.val_measures)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the masked tokens of a batch to the measures."""
        self._measure(self.test_measures, batch)

    def on_test_epoch_end(self) -> None:
        """Logs the same for the test."""
        self._log_measures("test", self.test_measures)

    def _measure(self, measures: CorpusLoss, batch: Batch) -> None:
        targets = batch["targets"][batch["targets"] != IGNORED]
        # A process may have no share of the last batch, and Transformers would trip over it.
        scores = self(batch) if len(batch["targets"]) else torch.zeros(0, 1, device=self.device)
        measures.update(scores[None], targets[None], torch.zeros((), device=self.device))

    def _log_measures(self, split: str, measures: CorpusLoss) -> None:
        self.log_dict({f"{split}/{name}": value for name, value in measures.compute().items()}, sync_dist=True)
        measures.reset()

    def next_command(self, run: str) -> str:
        """Teach it labels."""
        return (
            f"llm-train fit -c experiments/bert_imdb/offline.yaml --model.base {run} --data.tokenizer {run}/tokenizer"
        )

    def save_pretrained(self, folder: Path) -> None:
        """Writes the model as Transformers takes it; `AutoModel` loads its encoder from there.

        Args:
            folder: Folder to make.
        """
        save_pretrained(self.model, folder)
