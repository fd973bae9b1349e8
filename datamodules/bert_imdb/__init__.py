"""Encoders on film reviews: masked-word pretraining and classification."""

from datamodules.bert_imdb.data import BertImdbDataModule, MaskedReviewsDataModule
from datamodules.bert_imdb.film_reviews import FilmReviews
from datamodules.bert_imdb.reviews import AclImdb, HubReviews, ReviewFiles, TextReviews

__all__ = [
    "AclImdb",
    "BertImdbDataModule",
    "FilmReviews",
    "HubReviews",
    "MaskedReviewsDataModule",
    "ReviewFiles",
    "TextReviews",
]
