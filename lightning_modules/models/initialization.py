"""Weight initialisations: plain functions over a decoder, each with a name that YAML can choose.

What they must achieve (Glorot and Bengio, 2010): that neither the signal on its way up nor the gradient on its way down
grows or vanishes from layer to layer. For y = W x with independent weights of variance σ², var(y) = fan_in σ² var(x):
the signal asks for σ² = 1 / fan_in, the gradient for 1 / fan_out. In a pre-norm decoder the norms put the input of each
layer right, whatever σ is. What remains is the residual stream, to which 2 n_layer layers add:

    var(x_n) = var(x_0) + sum of the variances of what is added

and the embedding, which is the output matrix too: the larger its rows, the surer of its guesses is a network that knows
nothing yet. Its loss should be that of a uniform guess, ln(vocab_size).

Every function takes the decoder alone, writes all of its weights in place and draws from torch's global generator, so
that the run's seed decides. None relies on what was there before: a decoder built on the meta device and then given
memory (`to_empty`) is complete after one of them. With the same seed, those that draw normal numbers of fixed standard
deviations draw the same numbers and differ in the factors alone.

Papers: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010),
https://proceedings.mlr.press/v9/glorot10a.html; He et al., "Delving Deep into Rectifiers" (2015),
https://arxiv.org/abs/1502.01852; Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019);
Zhang et al., "Fixup Initialization" (2019), https://arxiv.org/abs/1901.09321.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.models.decoder import Decoder

InitializationName = Literal[
    "gpt2", "gpt2_unscaled", "zero_residual", "xavier", "kaiming", "pytorch_default", "too_small", "too_large"
]

GPT2_STD = 0.02


def gpt2(decoder: Decoder) -> None:
    """GPT-2's initialisation: N(0, 0.02²), residual projections N(0, 0.02² / (2 n_layer)), biases 0, norms 1.

    Two layers a block add to the residual stream, 2 n_layer in all; the smaller projections keep the variance of their
    sum from growing with depth. Radford et al. (2019), section 2.3.

    Args:
        decoder: Its weights are overwritten.
    """
    _normal(decoder, GPT2_STD, residual_std=GPT2_STD / math.sqrt(2 * decoder.config.n_layer))


def gpt2_unscaled(decoder: Decoder) -> None:
    """As `gpt2` without the scaling: N(0, 0.02²) everywhere, so that the residual stream grows with depth.

    Args:
        decoder: Its weights are overwritten.
    """
    _normal(decoder, GPT2_STD, residual_std=GPT2_STD)


def zero_residual(decoder: Decoder) -> None:
    """As `gpt2` with residual projections of 0: every block is the identity, and learns what to add.

    At the first step the projections alone have a gradient; what stands before them follows once they are not 0.
    Zhang et al. (2019) start the last layer of each residual branch so, to train without normalisation.

    Args:
        decoder: Its weights are overwritten.
    """
    _normal(decoder, GPT2_STD, residual_std=0.0)


def too_small(decoder: Decoder) -> None:
    """N(0, 0.002²) everywhere: a tenth of GPT-2's.

    Args:
        decoder: Its weights are overwritten.
    """
    _normal(decoder, 0.002, residual_std=0.002)


def too_large(decoder: Decoder) -> None:
    """N(0, 1) everywhere: fifty times GPT-2's.

    Args:
        decoder: Its weights are overwritten.
    """
    _normal(decoder, 1.0, residual_std=1.0)


def xavier(decoder: Decoder) -> None:
    """Glorot and Bengio's (2010): U(-a, a), a = √(6 / (fan_in + fan_out)), so of variance 2 / (fan_in + fan_out).

    Halfway between what signal and gradient ask for. Queries, keys and values are three matrices, though stored as
    one. The token embedding counts as what it is at the end, a layer from n_embd to vocab_size.

    Args:
        decoder: Its weights are overwritten.
    """

    def draw(name: str, weight: Tensor) -> None:
        for matrix in weight.chunk(3) if name.endswith(".qkv") else [weight]:
            nn.init.xavier_uniform_(matrix)

    _initialize(decoder, draw)


def kaiming(decoder: Decoder) -> None:
    """He et al.'s (2015): N(0, 2 / fan_in); the 2 makes up for the half of the signal that a rectifier cuts off.

    Args:
        decoder: Its weights are overwritten.
    """
    _initialize(decoder, lambda name, weight: nn.init.kaiming_normal_(weight))


def pytorch_default(decoder: Decoder) -> None:
    """What torch's layers do by themselves: embeddings N(0, 1); linear layers U(-a, a), a = 1 / √fan_in, biases too.

    Args:
        decoder: Its weights are overwritten.
    """
    for module in decoder.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.reset_parameters()


INITIALIZATIONS: dict[InitializationName, Callable[[Decoder], None]] = {
    function.__name__: function
    for function in (gpt2, gpt2_unscaled, zero_residual, xavier, kaiming, pytorch_default, too_small, too_large)
}


def _normal(decoder: Decoder, std: float, residual_std: float) -> None:
    def draw(name: str, weight: Tensor) -> None:
        nn.init.normal_(weight, std=residual_std if name.endswith(".projection") else std)

    _initialize(decoder, draw)


@torch.no_grad()
def _initialize(decoder: Decoder, draw: Callable[[str, Tensor], object]) -> None:
    """Draws every matrix with `draw(name of its module, weight)`; biases become 0, norms 1."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            draw(name, module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
