"""Weight initialisations of the decoder; YAML chooses one by name.

An initialisation should keep the variance of the signal in the forward pass, and that of the gradient in the backward
pass, the same from layer to layer (Glorot and Bengio, 2010). For y = W x with independent weights of variance σ²,
var(y) = fan_in σ² var(x), so the signal requires σ² = 1 / fan_in, and the gradient 1 / fan_out. In a pre-norm decoder
the norms fix the variance of the input of each attention and each feed-forward network for any σ that is not tiny. Two
variances remain. The first is that of the residual stream, to which these 2 n_layer parts add:

    var(x_n) = var(x_0) + sum of the variances of the added terms

The second is that of the output matrix, which is the token embedding too if the two are tied. An untrained network
should predict all tokens with equal probability, for a loss of ln(vocab_size); the larger the rows of the output
matrix, the more confident and the worse are its predictions.

Each function sets all weights of a decoder in place and draws from torch's global generator. A decoder that was built
on the meta device and moved by `to_empty` is therefore complete afterwards. With the same seed, the
functions that draw from normal distributions of fixed standard deviation draw the same numbers up to a factor.

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
from lightning_modules.models.value_embedding import ValueMix

InitializationName = Literal[
    "gpt2", "gpt2_unscaled", "zero_residual", "xavier", "kaiming", "pytorch_default", "too_small", "too_large"
]

GPT2_STD = 0.02


def gpt2(decoder: Decoder) -> None:
    """Initialise as GPT-2: N(0, 0.02²), residual projections N(0, 0.02² / (2 n_layer)), biases 0, norms 1.

    Two layers of each block add to the residual stream, 2 n_layer in total. With the smaller projections, the variance
    that they add does not grow with their number (Radford et al., 2019, section 2.3). A table of learned positions is
    drawn with 0.02 too, as in Transformers; the code of OpenAI draws it with 0.01.
    """
    _normal(decoder, GPT2_STD, residual_std=GPT2_STD / math.sqrt(2 * decoder.config.n_layer))


def gpt2_unscaled(decoder: Decoder) -> None:
    """Initialise as `gpt2` without the scaling: N(0, 0.02²) everywhere; the residual stream grows with depth."""
    _normal(decoder, GPT2_STD, residual_std=GPT2_STD)


def zero_residual(decoder: Decoder) -> None:
    """Initialise as `gpt2` with residual projections of 0, so that every block starts as the identity.

    Of a block, only the projections have a gradient at the first step; the layers before them follow once the
    projections are not 0. Zhang et al. (2019) initialise the last layer of each residual branch in this way to train
    without normalisation.
    """
    _normal(decoder, GPT2_STD, residual_std=0.0)


def too_small(decoder: Decoder) -> None:
    """Initialise all matrices with N(0, 0.002²), a tenth of the standard deviation of GPT-2."""
    _normal(decoder, 0.002, residual_std=0.002)


def too_large(decoder: Decoder) -> None:
    """Initialise all matrices with N(0, 1), fifty times the standard deviation of GPT-2."""
    _normal(decoder, 1.0, residual_std=1.0)


def xavier(decoder: Decoder) -> None:
    """Initialise as Glorot and Bengio (2010): U(-a, a), a = √(6 / (fan_in + fan_out)); variance 2 / (fan_in + fan_out).

    This variance is a compromise between the requirements of signal and gradient. Matrices that are stored as one count
    each: those of queries, keys and values, and the two parts of SwiGLU. The token embedding counts as the output
    layer, from n_embd to vocab_size.
    """

    def draw(name: str, weight: Tensor) -> None:
        part, _, linear = name.rpartition(".")
        stacked = getattr(decoder.get_submodule(part), "stacked_rows", {})
        for matrix in weight.split(stacked.get(linear, [len(weight)])):
            nn.init.xavier_uniform_(matrix)

    _initialize(decoder, draw)


def kaiming(decoder: Decoder) -> None:
    """Initialise as He et al. (2015): N(0, 2 / fan_in), where 2 makes up for the half that a rectifier sets to 0."""
    _initialize(decoder, lambda name, weight: nn.init.kaiming_normal_(weight))


def pytorch_default(decoder: Decoder) -> None:
    """Initialise as torch does: embeddings N(0, 1); linear layers and their biases U(-a, a), a = 1 / √fan_in."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.RMSNorm | ValueMix):
            module.reset_parameters()


INITIALIZATIONS: dict[str, Callable[[Decoder], None]] = {
    function.__name__: function
    for function in (gpt2, gpt2_unscaled, zero_residual, xavier, kaiming, pytorch_default, too_small, too_large)
}


def _normal(decoder: Decoder, std: float, residual_std: float) -> None:
    def draw(name: str, weight: Tensor) -> None:
        nn.init.normal_(weight, std=residual_std if name.endswith(".projection") else std)

    _initialize(decoder, draw)


@torch.no_grad()
def _initialize(decoder: Decoder, draw: Callable[[str, Tensor], object]) -> None:
    """Set each matrix by `draw(name of its module, weight)`, biases to 0, and the weights of norms to 1."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            draw(name, module.weight)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm | ValueMix):
            module.reset_parameters()
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
