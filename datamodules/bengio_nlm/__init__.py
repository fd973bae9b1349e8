"""The neural probabilistic language model of Bengio et al. (2003)."""

from datamodules.bengio_nlm.data import BengioNLMDataModule, BrownCorpus

__all__ = ["BengioNLMDataModule", "BrownCorpus"]
