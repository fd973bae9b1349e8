"""The statistics of each initialisation."""

import pytest
import torch

from lightning_modules.models import initialization
from lightning_modules.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=64)


def test_gpt2_statistics():
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    initialization.gpt2(decoder)
    n_residual = 0
    for name, parameter in decoder.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            is_residual = name.endswith("projection.weight")
            n_residual += is_residual
            # sqrt(2 * 8 layers) = 4
            assert parameter.std().item() == pytest.approx(0.005 if is_residual else 0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * 0.02, name
    assert n_residual == 2 * CONFIG.n_layer


def test_gpt2_follows_the_seed_and_nothing_else():
    states = []
    for seed, decoder in ((1, Decoder(CONFIG)), (1, Decoder(CONFIG)), (2, Decoder(CONFIG))):
        torch.manual_seed(seed)
        initialization.gpt2(decoder)
        states.append(decoder.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["token_embedding.weight"], states[2]["token_embedding.weight"])


@pytest.mark.parametrize("bias", [True, False])
def test_gpt2_leaves_no_weight_out(bias):
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=bias))
    decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    initialization.gpt2(decoder)
    assert all(torch.isfinite(parameter).all() and parameter.requires_grad for parameter in decoder.parameters())
