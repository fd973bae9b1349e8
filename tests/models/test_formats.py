"""Decoders of other parts as classes of Transformers: the same logits, gradients and greedy tokens, and back."""

import dataclasses
import json
import re

import pytest
import torch
from exported import LLAMA, NANOCHAT
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.models.formats import FORMATS, OWN_MODEL_TYPE, exported, imported
from lightning_modules.models.generation import generate

SIZES = {"vocab_size": 31, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
CONFIGS = {
    "gpt2, untied, another epsilon": DecoderConfig(**SIZES, tied_embeddings=False, norm_eps=1e-2),
    "llama": DecoderConfig(**SIZES, **LLAMA),
    "llama, few keys, untied, no bias": DecoderConfig(
        **SIZES, **LLAMA, n_kv_head=2, tied_embeddings=False, bias=False, attention_dropout=0.1
    ),
    "llama, as SmolLM2": DecoderConfig(**SIZES, **LLAMA, bias=False, norm_eps=1e-2, rotary_base=50.0),
    "nanochat": DecoderConfig(**SIZES, **NANOCHAT, tied_embeddings=False, logit_soft_cap=3.0),
    "nanochat, few keys, tied, no cap": DecoderConfig(**SIZES, **NANOCHAT, n_kv_head=1, rotary_base=50.0),
}


def random_decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder


def random_ids(T: int = 12) -> Tensor:  # noqa: N803
    return torch.randint(31, (3, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CONFIGS, ids=str)
def pair(request, tmp_path):
    """(our decoder, the model that `AutoModelForCausalLM` loads from its folder)."""
    decoder = random_decoder(CONFIGS[request.param])
    config, state, reason = exported(decoder)
    assert reason is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    classes = {"g": "GPT2LMHeadModel", "l": "LlamaForCausalLM", "n": "NanoChatForCausalLM"}
    assert type(model).__name__ == classes[request.param[0]]
    return decoder, model.eval()


def test_transformers_gives_the_same_logits_and_greedy_tokens(pair):
    ours, theirs = pair
    ids = random_ids()
    with torch.inference_mode():
        logits = theirs(ids).logits
        torch.testing.assert_close(ours(ids), logits, atol=1e-5, rtol=1e-5)
        assert logits.std() > 0.1
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        positions = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
        padded = theirs(ids, **positions).logits[mask.bool()]
        torch.testing.assert_close(ours(ids, **positions)[mask.bool()], padded, atol=1e-5, rtol=1e-5)
        tokens = theirs.generate(ids[:1], max_new_tokens=12, do_sample=False)[0, 12:]
    assert torch.stack(list(generate(ours, ids[:1], 12, temperature=0)))[:, 0].tolist() == tokens.tolist()


def test_back_to_our_decoder(pair):
    ours, theirs = pair
    again = imported(theirs.config.to_dict(), theirs.state_dict(), block_size=24)
    n_kv_head = again.config.n_kv_head  # Llama and NanoChat always say it
    assert again.config == dataclasses.replace(ours.config, n_kv_head=n_kv_head)
    assert n_kv_head == ours.config.n_kv_head or (ours.config.n_kv_head, n_kv_head) == (None, ours.config.n_head)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    assert (
        imported(theirs.config.to_dict(), theirs.state_dict(), block_size=7, attention="explicit").config.block_size
        == 7
    )


def test_the_same_gradients():
    ours = random_decoder(CONFIGS["nanochat"])
    config, state, _ = exported(ours)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    theirs.load_state_dict(state)
    ours(random_ids()).square().mean().backward()
    theirs(random_ids()).logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in FORMATS["nanochat"].decoder_state(gradients, ours.config).items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        (NANOCHAT | {"value_embeddings": True}, "NanoChatForCausalLM has no value_embeddings=True"),
        (NANOCHAT | {"bias": True}, "NanoChatForCausalLM has no bias=True"),
        (LLAMA | {"qk_norm": True}, "LlamaForCausalLM has no qk_norm=True"),
        ({"n_kv_head": 2, "tied_embeddings": False}, "GPT2LMHeadModel has no n_kv_head=2"),
        ({"norm": "rms"}, "GPT2LMHeadModel has no norm=rms"),
    ],
)
def test_a_decoder_without_a_class_is_saved_in_our_own_format(changes, missing):
    ours = random_decoder(DecoderConfig(**SIZES, **changes))
    config, state, reason = exported(ours)
    assert config["model_type"] == OWN_MODEL_TYPE
    assert reason == f"Transformers has no class for this decoder: {missing}"
    again = imported(json.loads(json.dumps(config)), state, block_size=24)
    assert again.config == ours.config
    assert torch.equal(again(random_ids()), ours(random_ids()))
    shorter = imported(config, state, block_size=12, attention="explicit")
    torch.testing.assert_close(shorter(random_ids()), ours(random_ids()))
    with pytest.raises(ValueError, match="is longer than the context: block_size=12"):
        shorter(random_ids(13))


def test_a_decoder_with_another_module_than_its_configuration_names_is_in_no_format():
    class Own(Decoder):
        """A decoder that may compute anything."""

    plain = DecoderConfig(**SIZES)
    changed, grown, cut, wide = (random_decoder(plain) for _ in range(4))
    changed.blocks[1].feed_forward.activation = nn.SiLU()
    grown.blocks[0].gate = nn.Linear(2, 2)
    cut.blocks = cut.blocks[:1]
    wide.blocks[0].feed_forward.expansion = nn.Linear(SIZES["n_embd"], 5)
    wide.embedding_dropout = nn.Dropout(0.5)  # does not change what it computes after the training
    for decoder, problem in (
        (changed, "blocks.1.feed_forward.activation is a SiLU"),
        (grown, "blocks.0.gate is a Linear"),
        (cut, "there is no blocks.1"),
        (
            wide,
            f"blocks.0.feed_forward.expansion is a Linear(in_features={SIZES['n_embd']}, out_features=5, bias=True)",
        ),
        (Own(plain), "the decoder is a Own"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(problem)}, which no format of a decoder has$"):
            exported(decoder)


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        ("gpt2", {"n_kv_head": 4}),
        ("gpt2", {"norm_eps": 1e-5}),
        ("gpt2", {"rotary_base": 50.0}),
        ("nanochat", NANOCHAT | {"norm_eps": 1e-6}),
    ],
)
def test_defaults_that_are_spelled_out_and_a_base_of_no_angles_are_no_parts_of_their_own(model_type, parts):
    config, _, reason = exported(random_decoder(DecoderConfig(**SIZES, **parts)))
    assert (config["model_type"], reason) == (model_type, None)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("llama", "intermediate_size", 100, "has intermediate_size=100: only 88 can be converted"),
        ("llama", "hidden_act", "gelu", "has hidden_act='gelu': only 'silu' can be converted"),
        ("llama", "mlp_bias", False, "has mlp_bias=False: only True can be converted"),
        ("llama", "head_dim", 16, "has head_dim=16: only 8 can be converted"),
        ("llama", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, "has rope_parameters={.*linear"),
        ("nanochat", "rms_norm_eps", 1e-5, "has rms_norm_eps=1e-05: our QK-norm has only 1e-06"),
        ("nanochat", "attention_bias", True, "has attention_bias=True: our decoder has biases everywhere or nowhere"),
        ("llama", "model_type", "mamba", "a mamba model: our decoder reads gpt2, llama, nanochat"),
    ],
)
def test_configurations_that_we_do_not_have(name, field, value, message):
    config, state, _ = exported(random_decoder(CONFIGS[name]))
    whole = AutoConfig.for_model(**config).to_dict()
    with pytest.raises(ValueError, match=message) as error:
        imported(whole | {field: value}, state, block_size=24)
    assert "\n" not in str(error.value)


def test_damaged_weights():
    config, state, _ = exported(random_decoder(CONFIGS["nanochat"]))
    whole = AutoConfig.for_model(**config).to_dict()
    with pytest.raises(ValueError, match=r"has extra\.weight, for which the decoder has no place"):
        imported(whole, state | {"extra.weight": torch.zeros(1)}, block_size=24)
    del state["model.layers.1.mlp.fc1.weight"]
    with pytest.raises(ValueError, match=r"has no model\.layers\.1\.mlp\.fc1\.weight: it is damaged"):
        imported(whole, state, block_size=24)
