"""An encoder with a pooling and a classification head, as a model of Transformers.

This file imports nothing else of the project. If Transformers itself has no class for a model, the file is saved next
to the weights, and `from_pretrained(folder, trust_remote_code=True)` loads the model with it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class EncoderClassifierConfig(PretrainedConfig):
    """Configuration of an `EncoderClassifier`.

    Args:
        encoder: Configuration of the encoder.
        pooling: Features of a text: `cls`, the vector of its first token; `mean`, the mean over its tokens; `both`,
            the two concatenated.
        head: `linear`, or `mlp`, which has a tanh layer before the linear one.
        dropout: Dropout before the last layer, in [0, 1).
        **others: Arguments of `PretrainedConfig`, such as `id2label`.
    """

    model_type = "encoder_classifier"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        pooling: str = "cls",
        head: str = "mlp",
        dropout: float = 0.1,
        **others: Any,
    ) -> None:
        self.encoder = encoder or {}
        self.pooling = pooling
        self.head = head
        self.dropout = dropout
        super().__init__(**others)


class ClassificationHead(nn.Module):
    """A linear layer from features to scores of the classes, optionally after a tanh layer as in BERT.

    Args:
        n_features: Length F of the features.
        n_classes: Number of classes K.
        has_hidden_layer: Whether to add the tanh layer.
        dropout: Dropout before the last layer, in [0, 1).
    """

    def __init__(self, n_features: int, n_classes: int, has_hidden_layer: bool, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(n_features, n_features) if has_hidden_layer else None
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(n_features, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return the scores of the classes, (B, K), for features (B, F)."""
        if self.dense is not None:
            features = torch.tanh(self.dense(features))
        return self.out(self.dropout(features))


class EncoderClassifier(PreTrainedModel):
    """An encoder, a pooling and a classification head.

    Args:
        config: Configuration of the model.
        encoder: Encoder with its weights; without it, an encoder is initialised at random.
    """

    config_class = EncoderClassifierConfig

    def __init__(self, config: EncoderClassifierConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = encoder or AutoModel.from_config(AutoConfig.for_model(**config.encoder))
        width = self.encoder.config.hidden_size * (2 if config.pooling == "both" else 1)
        self.head = ClassificationHead(width, config.num_labels, config.head == "mlp", config.dropout)
        self.post_init()
        # The pooler of BERT is the tanh layer of a head on the first token.
        dense = getattr(getattr(self.encoder, "pooler", None), "dense", None)
        self.encoder.pooler = None
        if config.pooling == "cls" and dense is not None and self.head.dense is not None:
            self.head.dense.load_state_dict(dense.state_dict())

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the head as that of BERT; the encoder initialises itself."""
        if isinstance(module, nn.Linear) and module in set(self.head.modules()):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def features(self, input_ids: Tensor, attention_mask: Tensor, of_encoder: Tensor | None = None) -> Tensor:
        """Return the features of texts, (B, F).

        Args:
            input_ids: Token ids, (B, T).
            attention_mask: 0 at padding and 1 elsewhere, (B, T).
            of_encoder: Mask of the encoder, if it takes another form than `attention_mask`.
        """
        mask = attention_mask if of_encoder is None else of_encoder
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state  # (B, T, C)
        first = hidden[:, 0]
        if self.config.pooling == "cls":
            return first
        weights = attention_mask[..., None].to(hidden.dtype)  # (B, T, 1)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return torch.cat([first, mean], dim=-1) if self.config.pooling == "both" else mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        """Return the scores of the classes, (B, K), for token ids and a mask of shape (B, T)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return SequenceClassifierOutput(logits=self.head(self.features(input_ids, attention_mask)))
