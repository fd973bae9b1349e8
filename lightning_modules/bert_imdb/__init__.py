"""Encoders on film reviews: pretraining on masked tokens, and classification."""

from lightning_modules.bert_imdb.bag_of_words import BagOfWords
from lightning_modules.bert_imdb.cached_features import CachedFeatures
from lightning_modules.bert_imdb.classification_report import ClassificationReport
from lightning_modules.bert_imdb.masked_lm import BertMaskedLMModule
from lightning_modules.bert_imdb.module import BertImdbModule
from lightning_modules.bert_imdb.predictions import PredictedLabels

__all__ = [
    "BagOfWords",
    "BertImdbModule",
    "BertMaskedLMModule",
    "CachedFeatures",
    "ClassificationReport",
    "PredictedLabels",
]
