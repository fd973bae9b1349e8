"""What learned position embeddings encode."""

from lightning_modules.position_probe.module import PositionProbeModule, WangChenModule
from lightning_modules.position_probe.report import PositionReport
from lightning_modules.position_probe.shifted_perplexity import ShiftedPerplexity

__all__ = ["PositionProbeModule", "PositionReport", "ShiftedPerplexity", "WangChenModule"]
