"""Generation with models of Transformers: the tokens are those of Transformers' own greedy search, in every family."""

import pytest
import torch
from torch import nn

from lightning_modules.finetuning.causal_lm import CachedHubModel
from lightning_modules.models import generation, recorded_step
from lightning_modules.models.cache import KeyValueCache

CONTEXT, VOCAB = 64, 61
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
POSITIONS = {"max_position_embeddings": CONTEXT}
# model type: sizes, and whether the family takes our cache
FAMILIES = {
    "gpt2": ({"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT}, True),
    "llama": (SMALL | POSITIONS | {"num_key_value_heads": 2}, True),
    "qwen2": (SMALL | POSITIONS | {"num_key_value_heads": 2}, True),
    "nanochat": (SMALL | POSITIONS | {"num_key_value_heads": 2}, True),
    "gpt_neox": (SMALL | POSITIONS, True),
    "opt": ({"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 4, "num_hidden_layers": 2} | POSITIONS, True),
    "mistral": (SMALL | POSITIONS | {"num_key_value_heads": 2, "sliding_window": 5}, False),
    "gpt_neo": (
        {
            "hidden_size": 16,
            "num_heads": 4,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        }
        | POSITIONS,
        False,
    ),
    "gemma3": (
        SMALL
        | POSITIONS
        | {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        False,
    ),
    "bloom": ({"hidden_size": 16, "n_head": 4, "n_layer": 2}, False),
    "mamba": ({"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, False),
}


def model_of(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"vocab_size": VOCAB} | no_tokens | FAMILIES[family][0]
    if family == "gemma3":  # its configuration has one for text and one for images
        vision = SMALL | {"image_size": 28, "patch_size": 14}
        sizes = {"text_config": sizes, "vision_config": vision, "tie_word_embeddings": False} | no_tokens
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.0 if "pos" in name or "wpe" in name else 0.5)
    return model


def generated(model, *args, **kwargs):
    """(B, number of new tokens)."""
    return torch.stack(list(generation.generate(CachedHubModel(model), *args, temperature=0, **kwargs)), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family, monkeypatch):
    model = model_of(family)
    ids = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :8] = 0
    expected = {
        padded: model.generate(ids, attention_mask=mask if padded else None, max_new_tokens=30, do_sample=False)[:, 9:]
        for padded in (False, True)
    }
    assert len(set(expected[False].flatten().tolist())) > 5
    cache = CachedHubModel(model).new_cache(CONTEXT)
    assert isinstance(cache[0], KeyValueCache) == FAMILIES[family][1]
    steps = []
    step = generation.RecordedStep.__call__
    monkeypatch.setattr(generation.RecordedStep, "__call__", lambda *args: steps.append(1) or step(*args))
    for fixed in (False, True)[: 1 + FAMILIES[family][1]]:
        if fixed:
            monkeypatch.setattr(generation, "_is_recorded", lambda *_: True)
            monkeypatch.setattr(recorded_step, "_SHORTEST_READ", 16)
        assert torch.equal(generated(model, ids, 30), expected[False])
        assert torch.equal(generated(model, ids, 30, attention_mask=mask), expected[True])
        assert len(steps) == 2 * 29 * fixed


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_a_gpu_are_those_of_transformers(family):
    model = model_of(family).cuda()
    ids = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :8] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)[:, 9:]
    assert torch.equal(generated(model, ids, 40, attention_mask=mask), expected.cpu())
