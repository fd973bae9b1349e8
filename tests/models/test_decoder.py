"""The decoder: shapes, causality, padding, cache, counts and errors."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.models import initialization
from lightning_modules.models.decoder import Decoder, DecoderConfig

TINY = DecoderConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=8)


def tiny_decoder(**changes):
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(TINY, **changes)).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def random_ids(B=2, T=10):  # noqa: N803
    return torch.randint(TINY.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_future_tokens_do_not_change_the_past(attention):
    decoder = tiny_decoder(attention=attention)
    ids = random_ids()
    before = decoder(ids)
    assert before.shape == (2, 10, 31)
    for t in range(1, 10):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % TINY.vocab_size
        after = decoder(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_logits_are_the_products_of_the_hidden_states_and_the_output_matrix():
    decoder = tiny_decoder()
    ids = random_ids()
    hidden = decoder.hidden_states(ids)
    assert hidden.shape == (2, 10, 8)
    torch.testing.assert_close(F.linear(hidden, decoder.output_weight), decoder(ids))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_implementations_agree_with_gradients(bias, padded):
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    results = []
    for attention in ("fused", "explicit"):
        decoder = tiny_decoder(attention=attention, bias=bias)
        logits = decoder(random_ids(), attention_mask=mask if padded else None)
        logits.square().mean().backward()
        assert torch.isfinite(logits).all()
        results.append([logits, *(parameter.grad for parameter in decoder.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
        assert torch.isfinite(one).all()


@pytest.mark.parametrize("chunks", [[10], [1] * 10, [4, 1, 3, 2]])
def test_cache_equals_no_cache(chunks):
    decoder = tiny_decoder()
    ids = random_ids()
    cache = decoder.new_cache()
    with torch.no_grad():
        pieces = [decoder(piece, cache=cache) for piece in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), decoder(ids))


def test_padding_does_not_change_the_text():
    decoder = tiny_decoder()
    ids = random_ids(1, 6)
    alone = decoder(ids)
    padding = torch.zeros(1, 4, dtype=torch.long)
    ones = torch.ones_like(ids)
    right = decoder(torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, padding], 1))
    torch.testing.assert_close(right[:, :6], alone)
    mask = torch.cat([padding, ones], 1)
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    left = decoder(torch.cat([padding, ids], 1), attention_mask=mask, position_ids=position_ids)
    torch.testing.assert_close(left[:, 4:], alone)
    # Without the mask, padding would change the logits.
    unmasked = decoder(torch.cat([padding, ids], 1), position_ids=position_ids)
    assert (unmasked[:, 4:] - alone).abs().max() > 1e-3


def test_last_only_scores_the_last_position():
    decoder = tiny_decoder()
    torch.testing.assert_close(decoder(random_ids(), last_only=True), decoder(random_ids())[:, -1:])


def test_the_position_of_a_token_changes_its_logits():
    decoder = tiny_decoder()
    ids = torch.full((1, 4), 5)
    logits = decoder(ids)[0]
    assert (logits[1:] - logits[:-1]).abs().max() > 1e-3  # the same token everywhere, only positions differ
    shifted = decoder(ids, position_ids=torch.arange(3, 7)[None])
    assert (shifted - logits).abs().max() > 1e-3


def test_embeddings_are_tied():
    decoder = tiny_decoder()
    assert [name for name, p in decoder.named_parameters() if 31 in p.shape] == ["token_embedding.weight"]
    unused = 30  # in no input, so its row affects only the output, and has a gradient only from there
    ids = random_ids() % 30
    before = decoder(ids)
    before[..., unused].sum().backward()
    assert decoder.token_embedding.weight.grad[unused].abs().max() > 0
    with torch.no_grad():
        decoder.token_embedding.weight[unused] *= 2
    after = decoder(ids)
    torch.testing.assert_close(after[..., unused], 2 * before[..., unused])
    torch.testing.assert_close(after[..., :unused], before[..., :unused])


def test_embedding_dropout_in_training_only():
    decoder = tiny_decoder(embedding_dropout=0.5)
    ids = random_ids()
    assert torch.equal(decoder(ids), decoder(ids))
    decoder.train()
    assert not torch.equal(decoder(ids), decoder(ids))


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_an_empty_batch_has_no_gradient(attention):
    decoder = tiny_decoder(attention=attention)
    ids = torch.empty(0, 10, dtype=torch.long)
    logits = decoder(ids)
    assert logits.shape == (0, 10, 31)
    assert decoder(ids, attention_mask=torch.ones(0, 10)).shape == (0, 10, 31)
    logits.sum().backward()
    assert all(not parameter.grad.any() for parameter in decoder.parameters())


def test_the_counts_of_gpt2_small():
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(vocab_size=50257))
    assert decoder.num_parameters() == 124_439_808
    # PaLM's formula: 6 (124,439,808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert decoder.flops_per_token() == 855_166_464


@pytest.mark.parametrize("vocab_size", [65, 1024])
def test_loss_at_start_is_that_of_a_uniform_guess(vocab_size):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=vocab_size, block_size=64, n_layer=4, n_head=4, n_embd=128))
    initialization.gpt2(decoder)
    ids = torch.randint(vocab_size, (8, 65))
    loss = F.cross_entropy(decoder(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.01)


def test_learns_a_sequence_by_heart():
    torch.manual_seed(0)
    decoder = Decoder(TINY)
    initialization.gpt2(decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-2)
    ids = random_ids(1, 13)
    for _ in range(30):
        loss = F.cross_entropy(decoder(ids[:, :-1]).flatten(0, 1), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_a_sequence_longer_than_the_context_is_refused():
    decoder = tiny_decoder()
    assert decoder(random_ids(1, 16)).shape == (1, 16, 31)
    with pytest.raises(ValueError, match=r"17 tokens is longer than the context: block_size=16"):
        decoder(random_ids(1, 17))
    cache = decoder.new_cache()
    decoder(random_ids(1, 12), cache=cache)
    with pytest.raises(ValueError, match=r"17 tokens is longer than the context: block_size=16"):
        decoder(random_ids(1, 5), cache=cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size=0: must be at least 1"),
        ({"block_size": 0}, r"block_size=0: must be at least 1"),
        ({"n_layer": -1}, r"n_layer=-1: must be at least 1"),
        ({"n_head": 0}, r"n_head=0: must be at least 1"),
        ({"n_embd": 0}, r"n_embd=0: must be at least 1"),
        ({"n_head": 3}, r"n_embd=8 is not divisible by n_head=3"),
        ({"embedding_dropout": 1.0}, r"embedding_dropout=1\.0: must be in \[0, 1\)"),
        ({"attention_dropout": -0.1}, r"attention_dropout=-0\.1: must be in \[0, 1\)"),
        ({"residual_dropout": float("nan")}, r"residual_dropout=nan: must be in \[0, 1\)"),
        ({"attention": "eager"}, r"attention='eager': choose 'fused' or 'explicit'"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(TINY, **changes)
    assert "\n" not in str(error.value)
