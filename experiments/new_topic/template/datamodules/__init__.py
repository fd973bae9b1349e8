"""Sequences whose most frequent token is to be named."""

from datamodules.majority.data import MajorityDataModule

__all__ = ["MajorityDataModule"]
