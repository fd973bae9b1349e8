"""What learned position embeddings encode."""

from datamodules.position_probe.data import PositionProbeDataModule

__all__ = ["PositionProbeDataModule"]
