"""The decoder, pretrained from scratch."""

from lightning_modules.decoder_pretrain.generalization import AblatedLoss, GeneralizationGap
from lightning_modules.decoder_pretrain.module import PretrainModule
from lightning_modules.decoder_pretrain.signal_propagation import SignalPropagation

__all__ = ["AblatedLoss", "GeneralizationGap", "PretrainModule", "SignalPropagation"]
