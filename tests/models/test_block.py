"""The pre-norm block and its feed-forward network."""

import math
from dataclasses import replace

import torch
from torch import nn

from lightning_modules.models.block import Block
from lightning_modules.models.cache import KeyValueCache
from lightning_modules.models.decoder import DecoderConfig
from lightning_modules.models.feed_forward import FeedForward

TINY = DecoderConfig(vocab_size=5, n_head=2, n_embd=8)


def test_feed_forward_by_hand():
    network = FeedForward(1)
    with torch.no_grad():
        network.expansion.weight.copy_(torch.tensor([[1.0], [-1.0], [2.0], [0.0]]))
        network.expansion.bias.zero_()
        network.projection.weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
        network.projection.bias.fill_(0.5)

    def gelu(x):  # GPT-2's
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    expected = gelu(1) + 10 * gelu(-1) + 100 * gelu(2) + 1000 * gelu(0) + 0.5
    torch.testing.assert_close(network(torch.ones(1, 1, 1)).item(), expected, rtol=1e-6, atol=0)


def test_the_feed_forward_network_treats_each_position_separately():
    torch.manual_seed(0)
    network = FeedForward(8)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(network(x)[:, 2:3], network(x[:, 2:3]))


def test_residual_and_pre_norm():
    torch.manual_seed(0)
    block = Block(TINY).eval()
    x = 3 + 5 * torch.randn(2, 4, 8)
    middle = x + block.attention(nn.functional.layer_norm(x, (8,)))
    expected = middle + block.feed_forward(nn.functional.layer_norm(middle, (8,)))
    torch.testing.assert_close(block(x), expected)
    for projection in (block.attention.projection, block.feed_forward.projection):
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    assert torch.equal(block(x), x)  # both halves add 0 to the stream


def test_residual_dropout_applies_to_both_halves_in_training_only():
    torch.manual_seed(0)
    block = Block(replace(TINY, n_embd=64, residual_dropout=0.5))
    x = torch.zeros(1, 16, 64)
    for silenced in (block.attention.projection, block.feed_forward.projection):
        other = ({block.attention.projection, block.feed_forward.projection} - {silenced}).pop()
        for parameter in silenced.parameters():
            nn.init.zeros_(parameter)
        nn.init.zeros_(other.weight)
        nn.init.ones_(other.bias)  # this half adds exactly 1 everywhere
        block.train()
        output = block(x)
        assert set(output.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < (output == 0).float().mean() < 0.6
        assert torch.equal(block.eval()(x), torch.ones_like(x))


def test_causal_and_cached():
    torch.manual_seed(0)
    block = Block(TINY).eval()
    x = torch.randn(1, 6, 8)
    changed = x.clone()
    changed[:, -1] += 1
    torch.testing.assert_close(block(changed)[:, :-1], block(x)[:, :-1])
    cache = KeyValueCache(6)
    with torch.no_grad():
        pieces = [block(piece, cache=cache) for piece in x.split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), block(x))


def test_arguments_reach_the_layers():
    block = Block(replace(TINY, attention_dropout=0.25, bias=False, attention="explicit"))
    assert block.attention.dropout == 0.25
    assert block.attention.implementation == "explicit"
    assert all(not name.endswith("bias") for name, _ in block.named_parameters())
    assert block.attention_norm.eps == block.feed_forward_norm.eps == 1e-5
