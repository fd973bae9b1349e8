"""Byte-pair encoding learned from corpora."""

from lightning_modules.bpe.module import BPEModule
from lightning_modules.bpe.report import TokenizerReport

__all__ = ["BPEModule", "TokenizerReport"]
