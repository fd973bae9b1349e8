"""An encoder with a pooling and a head of one's choice, in the form of a model of Transformers.

This file imports nothing else of the project: where Transformers has no model of this form itself, it is saved beside
the weights, and `from_pretrained(folder, trust_remote_code=True)` loads the model with it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class EncoderClassifierConfig(PretrainedConfig):
    """Sizes and names of an `EncoderClassifier`.

    Args:
        encoder: Configuration of the encoder.
        pooling: What becomes of the vectors of a text: `cls`, the first one; `mean`, their mean; `both`, the two in a
            row.
        head: What is on top: `linear`, or `mlp`, with a tanh layer before it.
        dropout: Share of what enters the last layer that is dropped in training.
        **others: What every configuration has; `id2label` among them.
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
    """From pooled features to a score for each class: a linear layer, or as in BERT one of tanh before it.

    Args:
        n_features: Length of the features.
        n_classes: Number of classes.
        has_hidden_layer: Whether there is the layer of tanh.
        dropout: Share of what enters the last layer that is dropped in training.
    """

    def __init__(self, n_features: int, n_classes: int, has_hidden_layer: bool, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(n_features, n_features) if has_hidden_layer else None
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(n_features, n_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of the classes: (B, F) to (B, classes)."""
        if self.dense is not None:
            features = torch.tanh(self.dense(features))
        return self.out(self.dropout(features))


class EncoderClassifier(PreTrainedModel):
    """An encoder, a pooling, a head.

    Args:
        config: Its sizes and names.
        encoder: The encoder, where it is at hand; otherwise it is drawn at random, for weights that are to follow.
    """

    config_class = EncoderClassifierConfig

    def __init__(self, config: EncoderClassifierConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = encoder or AutoModel.from_config(AutoConfig.for_model(**config.encoder))
        width = self.encoder.config.hidden_size * (2 if config.pooling == "both" else 1)
        self.head = ClassificationHead(width, config.num_labels, config.head == "mlp", config.dropout)
        self.post_init()
        # BERT's pooler is the hidden layer of a head that sees the first vector.
        pooler, self.encoder.pooler = getattr(self.encoder, "pooler", None), None
        if config.pooling == "cls" and hasattr(pooler, "dense") and self.head.dense is not None:
            self.head.dense.load_state_dict(pooler.dense.state_dict())

    def _init_weights(self, module: nn.Module) -> None:
        """As BERT's head begins; the encoder sees to its own weights."""
        if isinstance(module, nn.Linear) and module in set(self.head.modules()):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the head sees of texts: (B, T) to (B, F)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, C)
        first = hidden[:, 0]
        if self.config.pooling == "cls":
            return first
        weights = attention_mask[..., None].to(hidden.dtype)  # (B, T, 1)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return torch.cat([first, mean], dim=-1) if self.config.pooling == "both" else mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        """Scores of the classes: (B, T) to (B, classes)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return SequenceClassifierOutput(logits=self.head(self.features(input_ids, attention_mask)))
