"""The statistics of each initialisation, and their effect before the first step, compared with theory."""

import math
from functools import cache
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.initialization import INITIALIZATIONS, InitializationName

CONFIG = DecoderConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=64)
SMALL = DecoderConfig(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=8)
NAMES = sorted(INITIALIZATIONS)
FIXED = {"gpt2": (0.02, 0.005), "gpt2_unscaled": (0.02, 0.02), "zero_residual": (0.02, 0.0)}  # √(2 · 8 layers) = 4
FIXED |= {"too_small": (0.002, 0.002), "too_large": (1.0, 1.0)}


def initialized(name: str, config: DecoderConfig = CONFIG, seed: int = 0) -> Decoder:
    decoder = Decoder(config)
    torch.manual_seed(seed)
    INITIALIZATIONS[name](decoder)
    return decoder


def formula(initialization: str, name: str, fan_out: int, fan_in: int) -> float:
    """Standard deviation of a matrix (fan_out, fan_in)."""
    if initialization in FIXED:
        return FIXED[initialization][name.endswith("projection.weight")]
    if initialization == "kaiming":
        return math.sqrt(2 / fan_in)
    if initialization == "xavier":
        return math.sqrt(2 / (fan_in + (fan_out / 3 if "qkv" in name else fan_out)))
    return 1.0 if "embedding" in name else 1 / math.sqrt(3 * fan_in)  # U(-a, a) has a standard deviation of a / √3


@pytest.mark.parametrize("initialization", NAMES)
def test_every_weight_has_the_statistics_of_the_formula(initialization):
    n_matrices = 0
    for name, parameter in initialized(initialization).named_parameters():
        if parameter.dim() == 2:
            n_matrices += 1
            expected = formula(initialization, name, *parameter.shape)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05, abs=1e-12), name
            assert abs(parameter.mean().item()) <= 0.05 * expected, name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif "norm" in name or initialization != "pytorch_default":
            assert not parameter.any(), name
        else:  # the biases of torch's linear layers are drawn as their weights are
            fan_in = 256 if "feed_forward.projection" in name else 64
            assert parameter.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.25), name
    assert n_matrices == 2 + 4 * CONFIG.n_layer


def test_xavier_counts_each_of_the_matrices_that_are_stored_as_one():
    decoder = initialized(
        "xavier", DecoderConfig(20, 8, n_layer=1, n_head=4, n_embd=64, n_kv_head=1, feed_forward="swiglu")
    )
    block = decoder.blocks[0]
    parts = [*block.attention.qkv.weight.split([64, 16, 16]), *block.feed_forward.expansion.weight.chunk(2)]
    for matrix in parts:
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < matrix.abs().max().item() <= bound, matrix.shape


@pytest.mark.parametrize("initialization", NAMES)
def test_the_weights_depend_only_on_the_seed(initialization):
    one, again, other = (initialized(initialization, SMALL, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], other["token_embedding.weight"])


@pytest.mark.parametrize("initialization", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_weight_is_initialized(initialization, bias):
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=bias))
    decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    INITIALIZATIONS[initialization](decoder)
    assert all(torch.isfinite(parameter).all() and parameter.requires_grad for parameter in decoder.parameters())


def test_with_one_seed_normal_initializations_of_fixed_deviations_differ_by_a_factor():
    gpt2, others = initialized("gpt2").state_dict(), ("gpt2_unscaled", "too_small", "too_large")
    for decoder in map(initialized, others):
        for name, weight in decoder.state_dict().items():
            factor = weight.std() / gpt2[name].std() if weight.dim() == 2 else 1
            torch.testing.assert_close(weight, factor * gpt2[name], rtol=1e-4, atol=1e-6)


def test_yaml_can_choose_each_initialization():
    assert get_args(InitializationName) == tuple(INITIALIZATIONS)


@cache
def propagate(name: str, config: DecoderConfig = CONFIG) -> tuple[list[float], float, Decoder]:
    """Return the standard deviation of the residual stream at each depth, the loss on random tokens, and the decoder.

    The decoder has the gradients of the loss.
    """
    decoder = initialized(name, config)
    stream: list[Tensor] = []
    for module in [decoder.embedding_dropout, *decoder.blocks]:
        module.register_forward_hook(lambda module, inputs, output: stream.append(output))
    ids = torch.randint(decoder.config.vocab_size, (4, 65), generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(decoder(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return [x.std().item() for x in stream], loss.item(), decoder


def test_the_scaled_projections_keep_the_residual_stream_from_growing_with_depth():
    added = {}
    for name in ("gpt2", "gpt2_unscaled"):
        deviations, _, _ = propagate(name)
        assert deviations == sorted(deviations)
        assert deviations[0] == pytest.approx(0.02 * math.sqrt(2), rel=0.02)  # token and position
        added[name] = deviations[-1] ** 2 - deviations[0] ** 2
    # Each of the 2 n_layer layers adds 2 n_layer times the variance. Later attention averages away less of what earlier
    # layers add to all positions alike.
    assert added["gpt2_unscaled"] / added["gpt2"] == pytest.approx(2 * CONFIG.n_layer, rel=0.3)
    # Without the scaling, the variance grows in proportion to the depth.
    deviations, _, _ = propagate("gpt2_unscaled")
    halfway = deviations[4] ** 2 - deviations[0] ** 2
    assert added["gpt2_unscaled"] / halfway == pytest.approx(2, rel=0.25)


def test_zero_projections_make_every_block_the_identity_and_have_the_only_gradients():
    deviations, _, decoder = propagate("zero_residual")
    assert deviations == [deviations[0]] * (CONFIG.n_layer + 1)
    for name, parameter in decoder.blocks.named_parameters():
        if parameter.dim() == 2:
            assert bool(parameter.grad.any()) is name.endswith("projection.weight"), name


@pytest.mark.parametrize("initialization", ["gpt2", "gpt2_unscaled", "zero_residual", "too_small"])
def test_small_embeddings_predict_all_tokens_alike(initialization):
    _, loss, _ = propagate(initialization)
    assert loss == pytest.approx(math.log(CONFIG.vocab_size), rel=0.01)


def test_large_embeddings_predict_the_token_that_was_just_read():
    # The stream is about e + p, of variance 2. The row e of the token scores e · (e + p) / √2, about n_embd / √2; other
    # rows score around 0 with a deviation of √n_embd. So the token itself is predicted, and the loss is its score.
    shallow = DecoderConfig(vocab_size=500, block_size=64, n_layer=1, n_head=4, n_embd=256)
    _, loss, _ = propagate("pytorch_default", shallow)
    assert loss == pytest.approx(256 / math.sqrt(2), rel=0.05)


def test_too_large_a_deviation_makes_confident_random_predictions():
    # The scores have a deviation of √n_embd = 8: the largest of 500 is near 8 √(2 ln 500), that of the target near 0.
    _, loss, _ = propagate("too_large")
    assert 0.6 * 8 * math.sqrt(2 * math.log(500)) < loss < 8 * math.sqrt(2 * math.log(500))
