"""Probes of learned position embeddings."""

from datamodules.position_probe.data import PositionProbeDataModule

__all__ = ["PositionProbeDataModule"]
