"""The parts of the modern decoder against formulas written out, and the decoder assembled from them."""

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.models import initialization
from lightning_modules.models.attention import MultiHeadAttention, recorded_weights, scaled_dot_product_attention
from lightning_modules.models.cache import KeyValueCache
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.feed_forward import ACTIVATIONS, FeedForward, swiglu_width
from lightning_modules.models.generation import generate
from lightning_modules.models.norms import NORMS
from lightning_modules.models.positions import RotaryPositions, rotate

SIZES = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
MODERN: dict[str, Any] = {
    "positions": "rotary",
    "norm": "rms_unweighted",
    "feed_forward": "relu2",
    "qk_norm": True,
    "embedding_norm": True,
    "value_embeddings": True,
    "tied_embeddings": False,
    "logit_soft_cap": 5.0,
    "n_kv_head": 2,
    "bias": False,
}
# Each modern part alone in the classic decoder, and all together.
DECODERS = [{"positions": "rotary"}, {"norm": "rms"}, {"norm": "rms_unweighted"}, {"feed_forward": "relu2"}]
DECODERS += [{"feed_forward": "swiglu"}, {"qk_norm": True}, {"embedding_norm": True}, {"value_embeddings": True}]
DECODERS += [{"tied_embeddings": False}, {"logit_soft_cap": 5.0}, {"n_kv_head": 2}, {"n_kv_head": 1}, MODERN]


def decoder_of(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**SIZES, **changes)).eval()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder


def random_ids(B: int = 2, T: int = 10) -> Tensor:  # noqa: N803
    return torch.randint(31, (B, T), generator=torch.Generator().manual_seed(1))


def names(changes: dict[str, Any]) -> str:
    return "modern" if changes is MODERN else "-".join(f"{name}={value}" for name, value in changes.items())


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rms", "rms_unweighted"])
def test_rms_norm_by_its_formula(name):
    norm = NORMS[name](4, False)
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1e-3, 0.0, 0.0, 0.0]])
    gain = torch.tensor([1.0, 2.0, 3.0, 4.0])
    if name == "rms":
        with torch.no_grad():
            norm.weight.copy_(gain)
    else:
        assert not list(norm.parameters())
        gain = torch.ones(4)
    expected = x / (x.square().sum(1, keepdim=True) / 4 + 1e-6).sqrt() * gain
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("name", ["gelu", "relu2", "swiglu"])
def test_feed_forward_networks_by_their_formulas(name):
    torch.manual_seed(0)
    network = FeedForward(12, bias=True, name=name)
    x = torch.randn(5, 12)
    h = x @ network.expansion.weight.T + network.expansion.bias
    if name == "gelu":
        hidden = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    elif name == "relu2":
        hidden = torch.where(h > 0, h * h, 0)
    else:
        gate, up = h[:, :32], h[:, 32:]
        hidden = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(network(x), hidden @ network.projection.weight.T + network.projection.bias)


def test_all_feed_forward_networks_have_about_as_many_weights():
    sizes = [
        sum(p.numel() for p in FeedForward(768, bias=False, name=name).parameters())
        for name in ("gelu", "relu2", "swiglu")
    ]
    assert sizes == [8 * 768**2] * 3
    assert [swiglu_width(n) for n in (12, 24, 128)] == [32, 64, 344]


def test_rotary_positions_rotate_pairs_in_the_plane():
    positions = RotaryPositions(DecoderConfig(9, n_head=2, n_embd=8, positions="rotary"))
    t = torch.tensor([0, 1, 7])
    cos, sin = positions.rotation(t)
    x = torch.randn(1, 2, 3, 4)
    rotated = rotate(x, (cos, sin))
    for i, omega in enumerate((1.0, 10_000 ** (-2 / 4))):
        pair = torch.complex(x[..., i], x[..., i + 2]) * torch.exp(1j * omega * t)
        torch.testing.assert_close(torch.complex(rotated[..., i], rotated[..., i + 2]), pair)


def test_the_scores_of_rotary_positions_depend_on_the_distance_only():
    positions = RotaryPositions(DecoderConfig(9, n_head=2, n_embd=16, positions="rotary"))
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(t: int, s: int) -> float:
        at = [positions.rotation(torch.tensor([place])) for place in (t, s)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum().item()

    assert score(9, 4) == pytest.approx(score(40, 35), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotary_positions_need_an_even_width():
    with pytest.raises(ValueError, match=r"^positions=rotary needs heads of an even width, and n_embd / n_head is 3$"):
        DecoderConfig(9, n_head=2, n_embd=6, positions="rotary")


def test_normalised_queries_and_keys_bound_the_scores():
    torch.manual_seed(0)
    plain = MultiHeadAttention(32, 4, bias=False, implementation="explicit")
    normed = MultiHeadAttention(32, 4, bias=False, implementation="explicit", qk_norm=True)
    normed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        normed.qkv.weight[:64] *= 100  # of queries and keys: their length does not matter
    x = torch.randn(2, 6, 32)
    q, k, _ = plain.qkv(x).split(32, dim=-1)
    q, k = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in (q, k))
    cosines = nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)  # (B, H, T, T)
    scores = (math.sqrt(8) * cosines).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(normed.weights(x), scores.softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_grouped_heads_share_keys_and_values(implementation):
    torch.manual_seed(0)
    grouped = MultiHeadAttention(32, 4, bias=False, implementation=implementation, n_kv_head=2)
    whole = MultiHeadAttention(32, 4, bias=False)
    assert grouped.qkv.weight.shape == (32 + 2 * 16, 32)
    with torch.no_grad():
        q, k, v = grouped.qkv.weight.split([32, 16, 16])
        copies = [heads.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for heads in (k, v)]
        whole.qkv.weight.copy_(torch.cat([q, *copies]))
        whole.projection.weight.copy_(grouped.projection.weight)
    x = torch.randn(2, 6, 32)
    torch.testing.assert_close(grouped(x), whole(x))
    cache = KeyValueCache(6)
    with torch.no_grad():
        grouped(x, cache=cache)
    assert cache.update(torch.empty(2, 2, 0, 8), torch.empty(2, 2, 0, 8))[0].shape == (2, 2, 6, 8)  # half the memory


def test_value_embeddings_are_added_to_the_values():
    torch.manual_seed(0)
    attention = MultiHeadAttention(32, 4, bias=False, value_embeddings=True)
    assert attention.value_mix.weight.item() == 0.5
    x, token_values = torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    value = (
        attention.qkv(x)[..., 64:] + 0.5 * token_values
    )  # one position attends to itself, so its output is its value
    torch.testing.assert_close(attention(x, token_values=token_values), attention.projection(value))


def test_the_soft_cap_bounds_the_logits():
    capped, plain = decoder_of(logit_soft_cap=0.5), decoder_of()
    logits = plain(random_ids())
    assert logits.abs().max() > 1.5
    torch.testing.assert_close(capped(random_ids()), 0.5 * torch.tanh(logits / 0.5))
    torch.testing.assert_close(capped.hidden_states(random_ids()), plain.hidden_states(random_ids()))


def test_an_output_matrix_of_its_own():
    decoder = decoder_of(tied_embeddings=False)
    assert decoder.output_weight is decoder.output.weight
    before = decoder(random_ids())
    with torch.no_grad():
        decoder.output.weight *= 2
    torch.testing.assert_close(decoder(random_ids()), 2 * before)


# --- the decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", DECODERS, ids=names)
def test_every_decoder_is_causal_and_cached_and_both_implementations_agree(changes, monkeypatch):
    decoder, explicit = (decoder_of(attention=name, **changes) for name in ("fused", "explicit"))
    ids = random_ids()
    logits = decoder(ids)
    torch.testing.assert_close(explicit(ids), logits)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 31
    torch.testing.assert_close(decoder(changed)[:, :6], logits[:, :6])
    with torch.no_grad():
        cache = decoder.new_cache()
        pieces = [decoder(piece, cache=cache) for piece in ids.split([4, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits)
    logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoder.parameters())
    with recorded_weights(decoder) as weights:
        decoder(ids)
    assert [w.shape for w in weights] == [(2, 4, 10, 10)] * 2
    used = []

    def attend(*arguments: Any) -> tuple[Tensor, Tensor]:
        output, weights_of_layer = scaled_dot_product_attention(*arguments)
        used.append(weights_of_layer)
        return output, weights_of_layer

    monkeypatch.setattr("lightning_modules.models.attention.scaled_dot_product_attention", attend)
    explicit(ids)
    torch.testing.assert_close(weights, used)


@pytest.mark.parametrize("changes", DECODERS, ids=names)
def test_padding_on_the_left_does_not_change_the_text(changes):
    decoder = decoder_of(**changes)
    ids = random_ids(1, 6)
    padding, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)
    mask = torch.cat([padding, ones], 1)
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    left = decoder(torch.cat([padding, ids], 1), attention_mask=mask, position_ids=position_ids)
    torch.testing.assert_close(left[:, 4:], decoder(ids))


def test_the_modern_decoder_is_one_graph():
    decoder = decoder_of(**MODERN)
    compiled = torch.compile(decoder.hidden_states, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(random_ids()), decoder.hidden_states(random_ids()))


def test_only_distances_matter_to_a_decoder_with_rotary_positions():
    decoder = decoder_of(**MODERN)
    ids = random_ids()
    torch.testing.assert_close(decoder(ids, position_ids=torch.arange(5, 15)), decoder(ids), atol=1e-4, rtol=1e-4)
    order = decoder(ids, position_ids=torch.arange(10).flip(0))
    assert (order - decoder(ids)).abs().max() > 1e-2


def test_generation_goes_on_past_the_context():
    decoder = decoder_of(**MODERN)
    tokens = torch.stack(list(generate(decoder, random_ids(2, 5), 40, temperature=0)), dim=1)
    assert tokens.shape == (2, 40)
    text = torch.cat([random_ids(2, 5), tokens], dim=1)
    # The first token after the context was full follows from the last half of it.
    read = text[:, 16 + 1 - 8 : 16 + 1]
    assert torch.equal(decoder(read)[:, -1].argmax(-1), text[:, 17])


@pytest.mark.parametrize("initial", sorted(initialization.INITIALIZATIONS))
def test_every_weight_of_every_part_is_initialised(initial):
    changes = MODERN | {"norm": "rms", "bias": True}
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig(**SIZES, **changes))
    decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():
        nn.init.constant_(parameter, float("nan"))
    initialization.INITIALIZATIONS[initial](decoder)
    assert all(torch.isfinite(parameter).all() for parameter in decoder.parameters())
    assert torch.isfinite(decoder(random_ids())).all()
    assert all(block.attention.value_mix.weight.item() == 0.5 for block in decoder.blocks)


def test_the_names_and_the_random_numbers_of_the_classic_decoder_stay():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=5, block_size=3, n_layer=1, n_head=2, n_embd=4))
    initialization.gpt2(decoder)
    parts = ["attention_norm", "attention.qkv", "attention.projection"]
    parts += ["feed_forward_norm", "feed_forward.expansion", "feed_forward.projection"]
    expected = ["token_embedding.weight", "position_embedding.weight"]
    expected += [f"blocks.0.{part}.{kind}" for part, kind in itertools.product(parts, ("weight", "bias"))]
    assert list(decoder.state_dict()) == [*expected, "final_norm.weight", "final_norm.bias"]
    drawn = [decoder.token_embedding.weight[0, 0], decoder.blocks[0].feed_forward.projection.weight[3, 15]]
    assert [f"{number.item():.6f}" for number in [*drawn, torch.rand(())]] == ["0.011176", "-0.023600", "0.238755"]


def test_the_counts_of_a_decoder_of_other_parts():
    C, L, T, V, H_kv = 32, 2, 16, 31, 2  # noqa: N806
    decoder = decoder_of(**MODERN)
    matrices = L * (C * (C + 2 * H_kv * 8) + C * C + 8 * C * C) + V * C  # qkv, projection, feed-forward; output
    tables = V * C + V * H_kv * 8  # token and value embeddings are looked up
    assert decoder.num_parameters() == matrices + tables + L
    assert decoder.flops_per_token() == 6 * (matrices + L) + 12 * L * C * T
    # With tied embeddings, the table of the tokens is the output matrix, and multiplies.
    tied = decoder_of(**MODERN | {"tied_embeddings": True})
    assert tied.flops_per_token() == decoder.flops_per_token()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 3}, "n_kv_head=3: must divide n_head=4"),
        ({"n_kv_head": 0}, "n_kv_head=0: must divide n_head=4"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap=0.0: must be above 0, or None for no bound"),
        ({"norm": "batch"}, "norm='batch': choose 'layer' or 'rms' or 'rms_unweighted'"),
        ({"feed_forward": "relu"}, "feed_forward='relu': choose 'gelu' or 'relu2' or 'swiglu'"),
        ({"positions": "none"}, "positions='none': choose 'learned' or 'rotary'"),
        ({"attention": "flash"}, "attention='flash': choose 'fused' or 'explicit'"),
    ],
)
def test_bad_parts_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(DecoderConfig(**SIZES), **changes)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_compiled_network_keeps_the_hidden_layer_once(name):
    torch._dynamo.reset()
    network, x = FeedForward(8, name=name), torch.randn(5, 8, requires_grad=True)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    compiled = torch.compile(network, backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = compiled(x)
    assert [shape for shape in kept if shape[0] == 5 and shape[1] > 8] == [(5, network.expansion.out_features)]
    (found,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(found, torch.autograd.grad(network(x).sum(), [x])[0])
