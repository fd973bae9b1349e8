"""Byte-pair encoding learned from corpora."""

from datamodules.bpe.data import BPEDataModule

__all__ = ["BPEDataModule"]
