"""The decoder, pretrained from scratch."""

from datamodules.decoder_pretrain.data import PretrainDataModule

__all__ = ["PretrainDataModule"]
