"""Attention: worked examples, causality, and equality of both implementations."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.models.attention import (
    MultiHeadAttention,
    causal_mask,
    recorded_weights,
    scaled_dot_product_attention,
)
from lightning_modules.models.block import Block
from lightning_modules.models.cache import KeyValueCache
from lightning_modules.models.decoder import DecoderConfig
from lightning_modules.models.positions import RotaryPositions


def both_implementations(n_embd=12, n_head=3, **kwargs):
    """Return a fused and an explicit layer with the same weights."""
    torch.manual_seed(0)
    fused = MultiHeadAttention(n_embd, n_head, **kwargs)
    explicit = MultiHeadAttention(n_embd, n_head, implementation="explicit", **kwargs)
    explicit.load_state_dict(fused.state_dict())
    return fused, explicit


def output_and_gradients(attention, x, mask=None, cache=None):
    x = x.clone().requires_grad_()
    output = attention(x, mask, cache)
    output.square().sum().backward()
    return [output, x.grad, *(parameter.grad for parameter in attention.parameters())]


def test_worked_example():
    # One query, two keys, D = 4: scores 2 ln 3 and 0, by 1/sqrt(4): ln 3 and 0, so the weights are 3/4 and 1/4.
    query = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    key = torch.tensor([[math.log(3), 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    value = torch.tensor([[8.0, 0.0], [0.0, 4.0]])
    output, weights = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(output, torch.tensor([[6.0, 1.0]]))
    # With scale 1 the scores stay 2 ln 3 and 0: 9/10 and 1/10.
    _, weights = scaled_dot_product_attention(query, key, value, scale=1.0)
    torch.testing.assert_close(weights, torch.tensor([[0.9, 0.1]]))
    # A mask on the second key leaves all the weight to the first.
    output, weights = scaled_dot_product_attention(query, key, value, mask=torch.tensor([[True, False]]))
    assert weights.tolist() == [[1.0, 0.0]]
    assert output.tolist() == [[8.0, 0.0]]


def test_dropout_scales_what_it_keeps():
    torch.manual_seed(0)
    query, key = torch.zeros(1, 1, 4), torch.zeros(1, 1000, 4)
    output, weights = scaled_dot_product_attention(query, key, torch.eye(1000)[None], dropout_p=0.25)
    torch.testing.assert_close(weights, torch.full((1, 1, 1000), 0.001))  # returned without dropout
    kept = output[output > 0]
    assert 700 < len(kept) < 800
    torch.testing.assert_close(kept, torch.full_like(kept, 0.001 / 0.75))


def test_causal_mask():
    assert causal_mask(3, 3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_written_out_equals_torch(masked, scale):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[..., 0] = True  # every query has a key
    mask = mask if masked else None
    output, weights = scaled_dot_product_attention(query, key, value, mask, scale=scale)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value, mask, scale=scale))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("kind", ["causal", "padding mask", "bidirectional"])
def test_implementations_agree(kind, scale, bias):
    fused, explicit = both_implementations(bias=bias, scale=scale)
    x = torch.randn(2, 6, 12)
    mask = None
    if kind == "padding mask":  # the second row's last two positions are padding
        mask = causal_mask(6, 6).repeat(2, 1, 1, 1)
        mask[1, ..., 4:] = False
    elif kind == "bidirectional":
        mask = torch.ones(6, 6, dtype=torch.bool)
    for one, other in zip(output_and_gradients(fused, x, mask), output_and_gradients(explicit, x, mask), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n_new", [1, 3])
def test_implementations_agree_with_a_cache(n_new):
    fused, explicit = both_implementations()
    past, x = torch.randn(2, 4, 12), torch.randn(2, n_new, 12)
    results = []
    for attention in (fused, explicit):
        cache = KeyValueCache(8)
        with torch.no_grad():
            attention(past, cache=cache)
        results.append(output_and_gradients(attention, x, cache=cache))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
class TestBothImplementations:
    def attention(self, implementation):
        torch.manual_seed(0)
        return MultiHeadAttention(12, 3, implementation=implementation).eval()

    def test_future_does_not_change_the_past(self, implementation):
        attention = self.attention(implementation)
        x = torch.randn(1, 6, 12)
        changed = x.clone()
        changed[:, 4:] = torch.randn(1, 2, 12)
        before, after = attention(x), attention(changed)
        torch.testing.assert_close(after[:, :4], before[:, :4])
        assert (after[:, 4:] - before[:, 4:]).abs().amax(dim=-1).min() > 1e-3

    @pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 3, 1]])
    def test_in_chunks_with_a_cache_equals_at_once(self, implementation, chunks):
        attention = self.attention(implementation)
        x = torch.randn(2, 6, 12)
        cache = KeyValueCache(8)
        with torch.no_grad():
            pieces = [attention(piece, cache=cache) for piece in x.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), attention(x))
        assert cache.length == 6

    def test_heads_are_separate(self, implementation):
        # Without the mixing of W_O, the output of a head depends only on its own part of q, k and v.
        attention = self.attention(implementation)
        with torch.no_grad():
            attention.projection.weight.copy_(torch.eye(12))
            attention.projection.bias.zero_()
            x = torch.randn(1, 5, 12)
            before = attention(x)
            for part in range(3):  # q, k, v of the last head
                attention.qkv.weight[12 * part + 8 : 12 * (part + 1)] += 1
            after = attention(x)
        torch.testing.assert_close(after[..., :8], before[..., :8])
        assert not torch.allclose(after[..., 8:], before[..., 8:])

    def test_dropout_in_training_only(self, implementation):
        attention = self.attention(implementation)
        attention.dropout = 0.5
        x = torch.randn(1, 6, 12)
        assert torch.equal(attention(x), attention(x))
        attention.train()
        assert not torch.equal(attention(x), attention(x))

    def test_empty_batch(self, implementation):
        assert self.attention(implementation)(torch.empty(0, 6, 12)).shape == (0, 6, 12)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("mask", [None, torch.ones(6, 6, dtype=torch.bool)], ids=["causal", "bidirectional"])
def test_weights_are_those_with_which_the_fused_kernels_mix_the_values(mask, scale):
    torch.manual_seed(0)
    attention = MultiHeadAttention(12, 3, scale=scale).eval()
    x = torch.randn(2, 6, 12)
    weights = attention.weights(x, mask)
    assert weights.shape == (2, 3, 6, 6)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 6))
    assert (weights[..., 0, 1:] == 0).all() == (mask is None)
    value = attention.qkv(x)[..., 24:].view(2, 6, 3, 4).transpose(1, 2)
    mixed = (weights @ value).transpose(1, 2).reshape(2, 6, 12)
    torch.testing.assert_close(attention.projection(mixed), attention(x, mask))


def test_the_scale_is_a_factor_on_the_scores():
    torch.manual_seed(0)
    plain, unscaled = MultiHeadAttention(8, 2), MultiHeadAttention(8, 2, scale=1.0)
    unscaled.load_state_dict(plain.state_dict())
    with torch.no_grad():  # queries that are √4 longer, divided by √4
        plain.qkv.weight[:8] *= 2
        plain.qkv.bias[:8] *= 2
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(plain.weights(x), unscaled.weights(x))


def test_recorded_weights_are_those_of_every_layer_that_ran():
    torch.manual_seed(0)
    config = DecoderConfig(5, n_head=2, n_embd=8)
    first, second = Block(config), Block(replace(config, attention="explicit"))
    model = torch.nn.Sequential(first, second)
    x = torch.randn(2, 5, 8)
    expected = [first.attention.weights(first.attention_norm(x))]
    expected.append(second.attention.weights(second.attention_norm(first(x))))
    with recorded_weights(model) as weights:
        output = model(x)
    torch.testing.assert_close(weights, expected)
    assert output.requires_grad
    assert not weights[0].requires_grad
    torch.testing.assert_close(model(x), output)
    assert len(weights) == 2  # the hooks are removed


def test_recorded_weights_are_those_of_the_mask_and_the_rotation_however_they_are_given():
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(8, 2), torch.randn(2, 5, 8)
    mask = causal_mask(5, 5).triu(-1)
    rotation = RotaryPositions(DecoderConfig(5, n_head=2, n_embd=8)).rotation(torch.arange(5))
    query, key, _ = attention._heads(x, rotation)
    expected = (query @ key.mT / 2).masked_fill(~mask, -math.inf).softmax(-1)
    with recorded_weights(attention) as weights:
        attention(x, mask, None, rotation)
        attention(x, mask, rotation=rotation)
        attention(x, mask=mask, rotation=rotation)
        attention(rotation=rotation, mask=mask, x=x)
    torch.testing.assert_close(weights, [expected] * 4)


def test_cache_is_zero_where_nothing_is_written():
    cache = KeyValueCache(4)
    cache.fix(torch.tensor([1]), n_read=4)
    torch.use_deterministic_algorithms(True)  # fills empty memory with NaN
    try:
        keys, values = cache.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert (keys.flatten().tolist(), values.flatten().tolist()) == ([0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])


def test_cache_reuses_its_memory():
    cache = KeyValueCache(4)
    key, value = torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 5)
    keys, values = cache.update(key, value)
    assert torch.equal(keys, key)
    assert torch.equal(values, value)
    address = keys.data_ptr()
    keys, _ = cache.update(key[:, :, :1], value[:, :, :1])
    assert keys.shape == (1, 2, 4, 5)
    cache.clear()
    keys, values = cache.update(-key, -value)
    assert torch.equal(keys, -key)
    assert torch.equal(values, -value)
    assert keys.data_ptr() == address


def test_errors():
    with pytest.raises(ValueError, match=r"n_embd=10 is not divisible by n_head=3"):
        MultiHeadAttention(10, 3)
    with pytest.raises(ValueError, match=r"'flash': choose 'fused' or 'explicit'"):
        MultiHeadAttention(12, 3, implementation="flash")
