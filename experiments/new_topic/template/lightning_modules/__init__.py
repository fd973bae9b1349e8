"""Classifying sequences by their most frequent token."""

from lightning_modules.majority.module import MajorityModule
from lightning_modules.majority.report import MajorityByMargin

__all__ = ["MajorityByMargin", "MajorityModule"]
