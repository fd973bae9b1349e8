"""Probes of learned position embeddings."""

from lightning_modules.position_probe.module import PositionProbeModule
from lightning_modules.position_probe.report import PositionReport
from lightning_modules.position_probe.shifted_perplexity import ShiftedPerplexity
from lightning_modules.position_probe.wang_chen import WangChenModule

__all__ = ["PositionProbeModule", "PositionReport", "ShiftedPerplexity", "WangChenModule"]
