"""Norms: each position is brought to one scale before a layer reads it.

    LayerNorm(x) = (x - mean(x)) / √(var(x) + ε) · γ + β        over the C features of a position
    RMSNorm(x)   = x / √(mean(x²) + ε) · γ

RMSNorm leaves out the mean and the shift β: what helps training is the scale. Without the gain γ it has no weights; the
matrix that follows can learn the same gain.

Papers: Ba et al., "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450; Zhang and Sennrich, "Root Mean Square
Layer Normalization" (2019), https://arxiv.org/abs/1910.07467.
"""

from collections.abc import Callable
from typing import Literal

from torch import nn

NormName = Literal["layer", "rms", "rms_unweighted"]

LAYER_NORM_EPSILON = 1e-5  # GPT-2's
RMS_NORM_EPSILON = 1e-6  # that of Llama and nanochat


def layer(n_features: int, bias: bool, epsilon: float | None = None) -> nn.Module:
    """Return LayerNorm with gain, and with a shift if `bias`."""
    return nn.LayerNorm(n_features, LAYER_NORM_EPSILON if epsilon is None else epsilon, bias=bias)


def rms(n_features: int, bias: bool, epsilon: float | None = None) -> nn.Module:
    """Return RMSNorm with gain; it never has a shift."""
    return nn.RMSNorm(n_features, RMS_NORM_EPSILON if epsilon is None else epsilon)


def rms_unweighted(n_features: int, bias: bool, epsilon: float | None = None) -> nn.Module:
    """Return RMSNorm without weights."""
    return nn.RMSNorm(n_features, RMS_NORM_EPSILON if epsilon is None else epsilon, elementwise_affine=False)


NORMS: dict[str, Callable[[int, bool, float | None], nn.Module]] = {
    function.__name__: function for function in (layer, rms, rms_unweighted)
}
