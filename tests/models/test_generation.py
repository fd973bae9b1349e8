"""Sampling keeps exactly the right tokens; generation with a cache gives the tokens of generation without one."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.models import generation, recorded_step
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.generation import generate, next_token_distribution, sample_next

TINY = DecoderConfig(vocab_size=31, block_size=16, n_layer=2, n_head=2, n_embd=8)

MODERN = {
    "n_head": 4,
    "n_kv_head": 2,
    "positions": "rotary",
    "norm": "rms",
    "feed_forward": "swiglu",
    "qk_norm": True,
    "value_embeddings": True,
    "logit_soft_cap": 15.0,
}


def tiny_decoder(**changes):
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(TINY, **changes)).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return decoder


def random_ids(B, T):  # noqa: N803
    return torch.randint(TINY.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


def generated(*args, **kwargs):
    """(B, number of new tokens)."""
    return torch.stack(list(generate(*args, **kwargs)), dim=1)


def kept(logits, **kwargs):
    """Return the tokens that can be drawn, a set for each row."""
    return [set(row.nonzero().flatten().tolist()) for row in next_token_distribution(logits, **kwargs)]


# Probabilities 1/8, 1/2, 1/16, 1/4, 1/16: exact in binary.
LOGITS = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]]).log()


class TestDistribution:
    def test_plain_is_softmax(self):
        torch.testing.assert_close(next_token_distribution(LOGITS), LOGITS.exp())

    def test_temperature(self):
        expected = LOGITS.exp().square()  # temperature 1/2 squares the odds
        torch.testing.assert_close(next_token_distribution(LOGITS, temperature=0.5), expected / expected.sum())
        assert next_token_distribution(LOGITS, temperature=0).tolist() == [[0, 1, 0, 0, 0]]
        assert next_token_distribution(LOGITS * 1e10, temperature=1e-30).tolist() == [[0, 1, 0, 0, 0]]
        assert next_token_distribution(LOGITS, temperature=1e-46).tolist() == [[0, 1, 0, 0, 0]]  # 0 in float32

    @pytest.mark.parametrize(
        ("top_k", "expected"), [(1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3, 4})]
    )
    def test_top_k(self, top_k, expected):
        assert kept(LOGITS, top_k=top_k) == [expected]

    @pytest.mark.parametrize(
        ("top_p", "expected"),
        [
            (1e-9, {1}),
            (0.49, {1}),
            (0.5, {1}),
            (0.51, {1, 3}),
            (0.75, {1, 3}),
            (0.8, {0, 1, 3}),
            (0.9, {0, 1, 2, 3}),
            (1.0, {0, 1, 2, 3, 4}),
        ],
    )
    def test_top_p(self, top_p, expected):
        assert kept(LOGITS, top_p=top_p) == [expected]

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_top_p_works_with_deterministic_algorithms_and_leaves_them_on(self, device):
        torch.use_deterministic_algorithms(True, warn_only=False)
        try:
            assert kept(LOGITS.to(device), top_p=0.51) == [{1, 3}]
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        finally:
            torch.use_deterministic_algorithms(False)

    def test_what_is_left_sums_to_one(self):
        torch.testing.assert_close(next_token_distribution(LOGITS, top_k=2), torch.tensor([[0, 2 / 3, 0, 1 / 3, 0]]))
        # top_p applies to the rescaled probabilities: that of the first token is 2/3.
        assert kept(LOGITS, top_k=2, top_p=0.6) == [{1}]
        assert kept(LOGITS, top_k=2, top_p=0.7) == [{1, 3}]

    def test_rows_are_separate(self):
        logits = torch.stack([LOGITS[0], LOGITS[0].flip(0)])
        assert kept(logits, top_k=2) == [{1, 3}, {3, 1}]
        assert kept(logits, top_k=3) == [{0, 1, 3}, {4, 3, 1}]
        assert kept(logits, top_p=0.5) == [{1}, {3}]

    def test_logits_are_not_changed(self):
        logits = LOGITS.clone()
        next_token_distribution(logits, temperature=0.5, top_k=2, top_p=0.5)
        assert torch.equal(logits, LOGITS)

    @settings(max_examples=50, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        temperature=st.floats(0.1, 5),
        top_k=st.none() | st.integers(1, 40),
        top_p=st.none() | st.floats(0.01, 1),
    )
    def test_against_the_definition(self, seed, temperature, top_k, top_p):
        logits = torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
        p = (logits.double() / temperature).softmax(dim=-1)
        candidates = sorted(range(30), key=lambda token: -p[token])[:top_k]
        mass, nucleus, total = 0.0, [], p[candidates].sum()
        for token in candidates:
            if top_p is not None and mass >= top_p:
                break
            nucleus.append(token)
            mass += (p[token] / total).item()
        actual = next_token_distribution(logits[None], temperature, top_k, top_p)[0].double()
        expected = torch.zeros_like(p)
        expected[nucleus] = p[nucleus] / p[nucleus].sum()
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


class TestSampleNext:
    def test_frequencies(self):
        draws = sample_next(LOGITS.expand(20_000, 5), generator=torch.Generator().manual_seed(0))
        frequencies = draws.bincount(minlength=5) / len(draws)
        torch.testing.assert_close(frequencies, LOGITS.exp()[0], atol=0.015, rtol=0)

    def test_draws_are_those_of_multinomial(self):
        logits = torch.randn(500, 9, generator=torch.Generator().manual_seed(0))
        draws = sample_next(logits, 0.7, 5, generator=torch.Generator().manual_seed(1))
        probabilities = next_token_distribution(logits, 0.7, 5)
        expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1))
        assert torch.equal(draws, expected[:, 0])

    def test_greedy_takes_the_first_of_the_best(self):
        assert sample_next(torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 5.0]]), temperature=0).tolist() == [1, 0]
        assert sample_next(torch.tensor([[0.0, 2.0, 1.0]]), temperature=1e-46).tolist() == [1]


@torch.no_grad()
def greedy_without_cache(decoder, context, max_new_tokens):
    """Return the tokens that `generate` should give, computed without a cache."""
    block_size = decoder.config.block_size
    context, tokens = context[:, -block_size:], []
    for _ in range(max_new_tokens):
        if context.size(1) > block_size:
            context = context[:, -max(1, block_size // 2) :]
        tokens.append(decoder(context)[:, -1].argmax(dim=-1))
        context = torch.cat([context, tokens[-1][:, None]], dim=1)
    return torch.stack(tokens, dim=1)


@pytest.fixture(params=["growing", "fixed"])
def shapes(request, monkeypatch):
    """Run the steps with a cache that grows, or with the fixed shapes that a CUDA graph records, here on the CPU."""
    if request.param == "fixed":
        monkeypatch.setattr(generation, "_is_recorded", lambda *_: True)
        monkeypatch.setattr(recorded_step, "_SHORTEST_READ", 3)
        monkeypatch.setattr(generation, "_ROUND", 4)


@pytest.mark.usefixtures("shapes")
class TestGenerate:
    @pytest.mark.parametrize("prompt_length", [1, 7, 15, 16, 25])
    @pytest.mark.parametrize("attention", ["fused", "explicit"])
    def test_greedy_with_cache_equals_without(self, attention, prompt_length):
        decoder = tiny_decoder(attention=attention)
        ids = random_ids(3, prompt_length)
        # 30 tokens fill the context of 16 several times: each time, 8 of them are read again.
        assert torch.equal(generated(decoder, ids, 30, temperature=0), greedy_without_cache(decoder, ids, 30))

    @pytest.mark.parametrize("block_size", [1, 2, 3])
    def test_smallest_contexts(self, block_size):
        decoder = tiny_decoder(block_size=block_size)
        ids = random_ids(2, 2)
        assert torch.equal(generated(decoder, ids, 9, temperature=0), greedy_without_cache(decoder, ids, 9))

    def test_reads_the_end_of_a_long_prompt(self):
        decoder = tiny_decoder()
        ids = random_ids(1, 40)
        assert torch.equal(
            generated(decoder, ids, 5, temperature=0), generated(decoder, ids[:, -16:], 5, temperature=0)
        )

    def test_each_token_is_read_once(self):
        decoder = tiny_decoder()
        lengths = []
        decoder.register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
        generated(decoder, random_ids(1, 5), 14, temperature=0)
        assert lengths == [5] + [1] * 11 + [8] + [1]  # after 16 positions, the last 8 are read again

    def test_generator_decides(self):
        decoder = tiny_decoder()
        ids = random_ids(2, 4)
        first, again, other = (
            generated(decoder, ids, 30, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        state = torch.get_rng_state()
        generated(decoder, ids, 3, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("prompt_length", [6, 16, 25])
    def test_padding_on_the_left_changes_nothing(self, prompt_length):
        decoder = tiny_decoder()
        ids, n_padding = random_ids(4, prompt_length), [0, 2, 4, 5]
        mask = torch.stack([(torch.arange(prompt_length) >= n).long() for n in n_padding])
        for n_tokens in (8, 40):  # some rows are full after others
            together = generated(decoder, ids, n_tokens, temperature=0, attention_mask=mask)
            for row, n, tokens in zip(ids, n_padding, together, strict=True):
                # The whole batch reads the end of its context again at once: earlier than a row with padding alone.
                n_equal = n_tokens if n == 0 or prompt_length - n >= 16 else 16 - prompt_length + 1
                alone = generated(decoder, row[None, n:], n_tokens, temperature=0)[0]
                assert torch.equal(tokens[:n_equal], alone[:n_equal])

    @pytest.mark.parametrize("parts", [{}, MODERN], ids=["classic", "modern"])
    @pytest.mark.parametrize("attention", ["fused", "explicit"])
    def test_steps_of_fixed_shapes_equal_those_of_a_growing_cache(self, monkeypatch, attention, parts):
        decoder = tiny_decoder(attention=attention, **parts)
        mask = torch.ones(3, 5, dtype=torch.long)
        mask[0, :3] = 0

        def run():
            torch.manual_seed(4)
            return generated(
                decoder, random_ids(3, 5), 60, temperature=1.2, top_k=20, stop_token=30, attention_mask=mask
            )

        fixed = run()
        monkeypatch.setattr(generation, "_is_recorded", lambda *_: False)
        assert torch.equal(fixed, run())

    def test_top_k_one_is_greedy(self):
        decoder = tiny_decoder()
        ids = random_ids(2, 4)
        assert torch.equal(generated(decoder, ids, 20, top_k=1), generated(decoder, ids, 20, temperature=0))
        assert torch.equal(generated(decoder, ids, 20, top_p=1e-6), generated(decoder, ids, 20, temperature=0))

    def test_stop_token_ends_each_row(self):
        decoder = tiny_decoder()
        ids, n_tokens = random_ids(4, 3), 80

        def run(stop_token):
            generator = torch.Generator().manual_seed(3)
            return generated(decoder, ids, n_tokens, temperature=1.5, generator=generator, stop_token=stop_token)

        free, stopped, stop = run(None), run(7), 7
        ends = [row.tolist().index(stop) for row in free]
        assert len(set(ends)) > 1  # some rows end before others
        assert stopped.size(1) == max(ends) + 1
        for row, free_row, end in zip(stopped.tolist(), free.tolist(), ends, strict=True):
            assert row[: end + 1] == free_row[: end + 1]
            assert set(row[end:]) == {stop}

    def test_streams(self):
        decoder = tiny_decoder()
        calls = []
        decoder.register_forward_hook(lambda *_: calls.append(1))
        tokens = generate(decoder, random_ids(2, 3), 10)
        assert calls == []
        first = next(tokens)
        assert first.shape == (2,)
        assert first.dtype == torch.long
        assert len(calls) == 1
        assert len(list(tokens)) == 9

    def test_needs_no_gradients_and_leaves_the_callers_alone(self):
        decoder = tiny_decoder()
        needed = []
        hook = decoder.register_forward_hook(lambda module, args, logits: needed.append(logits.requires_grad))
        generated(decoder, random_ids(2, 3), 3)
        assert needed == [False] * 3
        hook.remove()
        for token in generate(decoder, random_ids(2, 3), 3):
            assert torch.is_grad_enabled()
            loss = decoder(token[:, None]).sum()  # the tokens can be trained on
            loss.backward()
        assert decoder.token_embedding.weight.grad is not None

    def test_nothing_to_do(self):
        assert list(generate(tiny_decoder(), random_ids(1, 3), 0)) == []


def test_tokens_are_awaited_on_the_device_that_has_them(monkeypatch):
    """The current device may be another, as for a model that was loaded with `device="cuda:1"`."""
    awaited = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=awaited.append, synchronize=lambda: None))
    tokens = SimpleNamespace(is_cuda=True, device="cuda:1", to=lambda *_, **__: torch.tensor([3]))
    assert [step.tolist() for step in generation._read_behind(iter([tokens, tokens]), stop_token=None)] == [[3], [3]]
    assert awaited == ["of cuda:1"] * 2


@pytest.mark.gpu
class TestRecorded:
    """Steps recorded as CUDA graphs."""

    @pytest.mark.parametrize("parts", [{}, MODERN], ids=["classic", "modern"])
    @pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
    def test_greedy_equals_the_steps_without_a_graph(self, monkeypatch, parts, autocast):
        monkeypatch.setattr(recorded_step, "_SHORTEST_READ", 64)
        decoder = tiny_decoder(block_size=200, **parts).cuda()
        ids = random_ids(3, 20).cuda()
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        graphs = []
        record = generation.RecordedStep._record
        monkeypatch.setattr(
            generation.RecordedStep, "_record", lambda *given: graphs.append(given[1]) or record(*given)
        )

        def run():
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                return generated(decoder, ids, 300, temperature=0, attention_mask=mask)  # past the context

        recorded = run()
        assert graphs == [64, 128, 256]
        monkeypatch.setattr(generation, "_is_recorded", lambda *_: False)
        equal = (recorded == run()).all(dim=0)
        assert equal[:8].all() if autocast else equal.all()

    def test_sampling_and_stopping(self):
        decoder, ids = tiny_decoder().cuda(), random_ids(4, 3).cuda()

        def run(seed, stop_token=None):
            generator = torch.Generator("cuda").manual_seed(seed)
            options = {"temperature": 1.5, "top_k": 25, "top_p": 0.95}
            return generated(decoder, ids, 80, generator=generator, stop_token=stop_token, **options)

        free = run(1)
        assert torch.equal(free, run(1))
        assert not torch.equal(free, run(2))
        assert len(set(free[0].tolist())) > 10
        stop = set.intersection(*(set(row.tolist()) for row in free)).pop()
        stopped = run(1, stop_token=stop)
        ends = [row.tolist().index(stop) for row in free]
        assert stopped.size(1) == max(ends) + 1
        for row, free_row, end in zip(stopped.tolist(), free.tolist(), ends, strict=True):
            assert row[: end + 1] == free_row[: end + 1]
            assert set(row[end:]) == {stop}
        first = generated(decoder, ids, 20)  # from torch's global generator
        assert not torch.equal(first, generated(decoder, ids, 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0: must be finite and at least 0"),
        ({"temperature": float("nan")}, r"temperature=nan: must be finite"),
        ({"temperature": float("inf")}, r"temperature=inf: must be finite"),
        ({"top_k": 0}, r"top_k=0: must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0\.0: must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1\.1: must be in \(0, 1\]"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1: must be at least 0"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, r"shape \(1, 0\): generation needs \(B, T\)"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"shape \(3,\): generation needs \(B, T\)"),
        ({"stop_token": 31}, r"stop_token=31: must be in \[0, vocab_size=31\)"),
        (
            {"attention_mask": torch.ones(1, 2)},
            r"attention_mask has shape \(1, 2\): must have",
        ),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, r"padding of a row must precede its tokens"),
        ({"attention_mask": torch.zeros(1, 3)}, r"padding of a row must precede its tokens"),
        ({"decoder": Decoder(TINY).train()}, r"in training mode.*decoder\.eval\(\)"),
    ],
)
def test_errors_come_at_the_call(arguments, message):
    arguments = {"decoder": tiny_decoder(), "input_ids": random_ids(1, 3), "max_new_tokens": 3} | arguments
    with pytest.raises(ValueError, match=message) as error:
        generate(**arguments)
    assert "\n" not in str(error.value)
