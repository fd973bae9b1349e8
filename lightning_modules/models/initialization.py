"""Weight initialisations: plain functions over a decoder, each with a name that YAML can choose.

Every function takes the decoder alone, writes all of its weights in place and draws from torch's global generator, so
that the run's seed decides. None relies on what was there before: a decoder built on the meta device and then given
memory (`to_empty`) is complete after one of them.
"""

import math

import torch
from torch import nn

from lightning_modules.models.decoder import Decoder


@torch.no_grad()
def gpt2(decoder: Decoder) -> None:
    """GPT-2's initialisation: N(0, 0.02²), residual projections N(0, 0.02² / (2 n_layer)), biases 0, norms 1.

    Two layers a block add to the residual stream, 2 n_layer in all; the smaller projections keep the variance of their
    sum from growing with depth. Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section
    2.3.

    Args:
        decoder: Its weights are overwritten.
    """
    std = 0.02
    residual_std = std / math.sqrt(2 * decoder.config.n_layer)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=residual_std if name.endswith(".projection") else std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
