"""Our decoder gives the logits of Transformers' GPT-2 for the same weights, in both directions and through a file."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_modules.models import initialization
from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.gpt2_format import (
    decoder_config_from_gpt2,
    from_gpt2_state_dict,
    gpt2_config,
    to_gpt2_state_dict,
)

CONFIGS = [
    DecoderConfig(vocab_size=31, block_size=16, n_layer=1, n_head=1, n_embd=8),
    DecoderConfig(vocab_size=65, block_size=24, n_layer=3, n_head=4, n_embd=32, bias=False),
    DecoderConfig(vocab_size=257, block_size=32, n_layer=2, n_head=6, n_embd=48, attention="explicit"),
    DecoderConfig(vocab_size=100, block_size=20, n_layer=5, n_head=2, n_embd=16, residual_dropout=0.3),
]
TINY = CONFIGS[0]


def random_decoder(config=TINY):
    """Return a decoder whose weights, norms and biases included, all have different values."""
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    initialization.gpt2(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def hugging_face(config, state, attention="sdpa"):
    model = GPT2LMHeadModel._from_config(GPT2Config(**gpt2_config(config)), attn_implementation=attention)
    model.load_state_dict(state)
    return model.eval()


def random_ids(config, B=3, T=12):  # noqa: N803
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.std() > 0.1  # constant logits would agree too


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.n_layer}-{config.n_head}-{config.n_embd}")
def pair(request):
    """(config, our decoder, Hugging Face's model) with the same weights."""
    decoder = random_decoder(request.param)
    with torch.inference_mode():
        yield request.param, decoder, hugging_face(request.param, to_gpt2_state_dict(decoder))


class TestSameLogits:
    def test_plain(self, pair):
        config, ours, theirs = pair
        for T in (1, 12, config.block_size):  # noqa: N806
            ids = random_ids(config, T=T)
            assert_same_logits(ours(ids), theirs(ids).logits)

    def test_eager(self, pair):
        config, ours, _ = pair
        theirs = hugging_face(config, to_gpt2_state_dict(ours), attention="eager")
        ids = random_ids(config)
        assert_same_logits(ours(ids), theirs(ids).logits)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("give_positions", [True, False])
    def test_padding(self, pair, side, give_positions):
        config, ours, theirs = pair
        ids = random_ids(config)
        mask = torch.ones_like(ids)
        for row, n_padding in enumerate((0, 3, 7)):
            mask[row, slice(n_padding) if side == "left" else slice(12 - n_padding, None)] = 0
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0) if give_positions else None
        arguments = {"attention_mask": mask, "position_ids": position_ids}
        real = mask.bool()
        assert_same_logits(ours(ids, **arguments)[real], theirs(ids, **arguments).logits[real])

    def test_cache(self, pair):
        config, ours, theirs = pair
        cache, past = ours.new_cache(), None
        for piece in random_ids(config).split([5, 1, 4, 1, 1], dim=1):
            output = theirs(piece, past_key_values=past, use_cache=True)
            past = output.past_key_values
            assert_same_logits(ours(piece, cache=cache), output.logits)

    def test_cache_and_left_padding(self, pair):
        config, ours, theirs = pair
        ids = random_ids(config)
        mask = torch.ones_like(ids)
        mask[1, :2], mask[2, :4] = 0, 0
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache, past, end = ours.new_cache(), None, 0
        for n_new in (6, 1, 1, 4):
            start, end = end, end + n_new
            arguments = {"attention_mask": mask[:, :end], "position_ids": position_ids[:, start:end]}
            output = theirs(ids[:, start:end], past_key_values=past, use_cache=True, **arguments)
            past = output.past_key_values
            real = mask[:, start:end].bool()
            assert_same_logits(ours(ids[:, start:end], cache=cache, **arguments)[real], output.logits[real])


def test_same_gradients():
    ours = random_decoder(CONFIGS[2])
    theirs = hugging_face(CONFIGS[2], to_gpt2_state_dict(ours))
    ids = random_ids(CONFIGS[2])
    ours(ids).square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in from_gpt2_state_dict(gradients, CONFIGS[2]).items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.n_layer}-{config.n_head}-{config.n_embd}")
def test_converting_to_gpt2_and_back_changes_nothing(config):
    decoder = random_decoder(config)
    state = from_gpt2_state_dict(to_gpt2_state_dict(decoder), config)
    assert list(state) == list(decoder.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in decoder.state_dict().items())
    assert decoder_config_from_gpt2(gpt2_config(config)) == dataclasses.replace(config, bias=True, attention="fused")


def test_through_a_folder(tmp_path):
    ours = random_decoder(CONFIGS[3])
    model = GPT2LMHeadModel(GPT2Config(**gpt2_config(ours.config)))
    model.save_pretrained(tmp_path, state_dict=to_gpt2_state_dict(ours))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs) is GPT2LMHeadModel
    ids = random_ids(ours.config)
    with torch.inference_mode():
        assert_same_logits(ours(ids), theirs(ids).logits)
    # The weights in the file are converted back.
    config = decoder_config_from_gpt2(theirs.config.to_dict())
    assert config == ours.config
    again = Decoder(config)
    again.load_state_dict(from_gpt2_state_dict(theirs.state_dict(), config))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_hugging_faces_own_random_weights():
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=2, n_head=3)).eval()
    config = decoder_config_from_gpt2(theirs.config.to_dict())
    ours = Decoder(config).eval()
    ours.load_state_dict(from_gpt2_state_dict(theirs.state_dict(), config))
    ids = random_ids(config)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_old_checkpoints():
    # The hub's first GPT-2 files: no prefix, no output matrix, and the causal mask among the weights.
    decoder = random_decoder()
    state = {name.removeprefix("transformer."): tensor for name, tensor in to_gpt2_state_dict(decoder).items()}
    del state["lm_head.weight"]
    state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    loaded = from_gpt2_state_dict(state, TINY)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in decoder.state_dict().items())


def test_context_can_be_cropped():
    decoder = random_decoder()
    config = dataclasses.replace(TINY, block_size=6)
    cropped = Decoder(config).eval()
    cropped.load_state_dict(from_gpt2_state_dict(to_gpt2_state_dict(decoder), config))
    ids = random_ids(TINY, T=6)
    torch.testing.assert_close(cropped(ids), decoder(ids))


def test_missing_fields_have_gpt2s_defaults():
    assert decoder_config_from_gpt2({}) == decoder_config_from_gpt2(GPT2Config().to_dict())


def test_matrices_can_be_written_to_safetensors():
    assert all(tensor.is_contiguous() for tensor in to_gpt2_state_dict(random_decoder()).values())


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("model_type", "gpt_neo", "'gpt2'"),
        ("activation_function", "relu", "'gelu_new' or 'gelu_pytorch_tanh'"),
        ("n_inner", 10, "None or 32"),
        ("scale_attn_weights", False, "True"),
        ("scale_attn_by_inverse_layer_idx", True, "False"),
        ("add_cross_attention", True, "False"),
    ],
)
def test_configurations_that_we_do_not_have(field, value, choices):
    with pytest.raises(ValueError, match=rf"has {field}={value!r}: only {choices} can be converted$"):
        decoder_config_from_gpt2(gpt2_config(TINY) | {field: value})


class TestBadStateDicts:
    def state(self):
        return to_gpt2_state_dict(random_decoder())

    def assert_refused(self, state, message, config=TINY):
        with pytest.raises(ValueError, match=message) as error:
            from_gpt2_state_dict(state, config)
        assert "\n" not in str(error.value)

    def test_missing(self):
        state = self.state()
        del state["transformer.h.0.ln_2.weight"]
        self.assert_refused(state, r"no h\.0\.ln_2\.weight: it is damaged or of another architecture")

    def test_more_layers_than_the_decoder(self):
        state = to_gpt2_state_dict(random_decoder(dataclasses.replace(TINY, n_layer=2)))
        self.assert_refused(state, r"has h\.1\.ln_1\.weight, for which the decoder has no place")

    def test_another_shape(self):
        config = dataclasses.replace(TINY, vocab_size=30)
        message = r"wte\.weight becomes token_embedding\.weight of shape \(31, 8\): the decoder has \(30, 8\)"
        self.assert_refused(self.state(), message, config)

    def test_shorter_context(self):
        config = dataclasses.replace(TINY, block_size=17)
        message = r"wpe\.weight becomes position_embedding\.weight of shape \(16, 8\): the decoder has \(17, 8\)"
        self.assert_refused(self.state(), message, config)

    def test_an_output_matrix_that_is_not_the_embedding_it_is_tied_to(self):
        state = self.state()
        state["lm_head.weight"] = state["lm_head.weight"] + 1
        self.assert_refused(state, r"lm_head\.weight is not wte\.weight, although tie_word_embeddings is true")

    def test_no_output_matrix(self):
        config = dataclasses.replace(TINY, tied_embeddings=False)
        state = to_gpt2_state_dict(random_decoder(config))
        del state["lm_head.weight"]
        self.assert_refused(state, r"no lm_head\.weight: it is damaged or of another architecture", config)

    def test_biases_into_a_decoder_without(self):
        config = dataclasses.replace(TINY, bias=False)
        self.assert_refused(self.state(), r"has h\.0\.ln_1\.bias, for which the decoder has no place", config)
