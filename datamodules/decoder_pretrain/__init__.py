"""Text for pretraining the decoder."""

from datamodules.decoder_pretrain.data import PretrainDataModule

__all__ = ["PretrainDataModule"]
