"""Pretraining of the decoder from scratch, with callbacks that measure its signal and its robustness."""

from lightning_modules.decoder_pretrain.ablated_loss import AblatedLoss
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.decoder_pretrain.signal_propagation import SignalPropagation

__all__ = ["AblatedLoss", "PretrainModule", "SignalPropagation"]
