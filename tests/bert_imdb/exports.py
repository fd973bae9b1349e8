"""Classifiers and a masked language model that are exported."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import TEXTS, Exported, with_large_weights

from datamodules.bert_imdb import BertImdbDataModule, FilmReviews
from datamodules.bert_imdb.wordpiece import learn_wordpieces
from lightning_modules.bert_imdb import BertImdbModule, BertMaskedLMModule

CLASSES = ["bad", "fair", "good"]
LONGEST = 24


def words() -> Any:
    """Return a tokenizer learned from a few reviews."""
    tokenizer = learn_wordpieces([review.text for review in FilmReviews().reviews("test")], 400)
    tokenizer.model_max_length = LONGEST
    return tokenizer


def classifier(folder: Path, its_class: str, trust: bool, truncation: str = "head", **arguments: Any) -> Exported:
    """Return a classifier of three classes on a tiny BERT."""
    from transformers import BertConfig, BertModel

    base = folder.with_name(f"base_of_{folder.name}")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    words().save_pretrained(base)
    data = BertImdbDataModule(FilmReviews(), str(base), 4, max_tokens=LONGEST, truncation=truncation)
    BertModel(BertConfig(vocab_size=data.vocab_size, max_position_embeddings=40, **sizes)).save_pretrained(base)
    arguments |= {"vocab_size": data.vocab_size, "block_size": LONGEST, "classes": CLASSES}
    module = with_large_weights(BertImdbModule(str(base), **arguments), 0.5)

    def check(model: Exported, said: dict[str, Any]) -> None:
        assert (said["class"], said["context"]) == (its_class, LONGEST)
        batch = data.batch_of_texts(data.tokenizer, {"max_tokens": LONGEST, "truncation": truncation}, TEXTS)
        with torch.no_grad():
            ours = model.module(batch).softmax(-1).tolist()
        for row, alone, together in zip(ours, said["alone"], said["together"], strict=True):
            assert alone == pytest.approx(dict(zip(CLASSES, row, strict=True)), abs=1e-5)
            assert together == pytest.approx(alone, abs=1e-5)

    return Exported(folder, module, data.tokenizer, {"kind": "classifier", "texts": TEXTS, "trust": trust}, check)


def masked(folder: Path) -> Exported:
    """Return a new BERT that predicts masked tokens."""
    tokenizer = words()
    module = BertMaskedLMModule(n_layer=1, n_embd=16, vocab_size=len(tokenizer), block_size=LONGEST, pad_token_id=0)
    return Exported(folder, module, tokenizer, {"kind": "masked", "text": "a [MASK] film"}, check_masked)


def check_masked(model: Exported, said: dict[str, Any]) -> None:
    """Check the most probable tokens in the place of the mask."""
    ids = torch.tensor([model.tokenizer("a [MASK] film")["input_ids"]])
    place = ids[0].tolist().index(model.tokenizer.mask_token_id)
    with torch.no_grad():
        scores = model.module.model(ids).logits[0, place]
    assert said == {"context": LONGEST, "filled": scores.topk(5).indices.tolist(), "long": 5}


MODELS = {
    "as_bert": partial(classifier, its_class="BertForSequenceClassification", trust=False),
    "end_of_a_text": partial(classifier, its_class="BertForSequenceClassification", trust=False, truncation="tail"),
    "with_code": partial(classifier, its_class="EncoderClassifier", trust=True, pooling="mean", head="linear"),
    "masked": masked,
}
