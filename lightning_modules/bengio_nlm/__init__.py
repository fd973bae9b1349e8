"""The neural probabilistic language model of Bengio et al. (2003)."""

from lightning_modules.bengio_nlm.module import BengioNLMModule
from lightning_modules.bengio_nlm.word_vectors import WordVectors

__all__ = ["BengioNLMModule", "WordVectors"]
