"""Packed records: attention with the ends of the records equals attention with a mask of the whole row."""

import pytest
import torch
from torch import nn

from lightning_modules.finetuning.bases import as_mask
from lightning_modules.finetuning.packed_attention import (
    attend_within_records,
    records_mask,
    use_attention_within_records,
)

LENGTH = 12
SMALL = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "llama": SMALL | {"num_key_value_heads": 2},
    "mistral": SMALL | {"num_key_value_heads": 2, "sliding_window": 3},
}
OWN_ATTENTION = {
    "gpt_neo": {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
}
# Two rows: records of 5 and 4 positions and padding; one of 12. The last end is repeated.
ENDS = torch.tensor([0, 5, 9, 12, 24, 24, 24], dtype=torch.int32)
POSITIONS_WITH_PADDING_APART = torch.tensor([[*range(5), *range(4), *range(3)], [*range(12)]])


def model_of(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        family, vocab_size=50, max_position_embeddings=32, eos_token_id=None, **(FAMILIES | OWN_ATTENTION)[family]
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_of_records_replace_the_mask_of_transformers(family):
    model = model_of(family)
    ids = torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(0))

    def outputs(**given):
        model.zero_grad()
        logits = model(ids, use_cache=False, **given).logits
        logits.square().mean().backward()
        return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    expected = outputs(position_ids=POSITIONS_WITH_PADDING_APART)
    mixed = outputs(position_ids=POSITIONS_WITH_PADDING_APART, attention_mask=torch.ones_like(ids))
    padded = model(ids, attention_mask=(torch.arange(LENGTH) > 3).long().expand(2, -1)).logits
    assert use_attention_within_records(model)
    found = outputs(position_ids=POSITIONS_WITH_PADDING_APART, attention_mask=as_mask(ENDS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[0], expected[0], atol=1e-2)
    whole = outputs(attention_mask=as_mask(torch.tensor([0, 12, 24], dtype=torch.int32)))  # each row is one record
    torch.testing.assert_close(whole, outputs(), rtol=1e-5, atol=1e-5)
    # Other masks work as before, and the name is not saved.
    torch.testing.assert_close(
        model(ids, attention_mask=(torch.arange(LENGTH) > 3).long().expand(2, -1)).logits, padded
    )
    torch.testing.assert_close(outputs(position_ids=POSITIONS_WITH_PADDING_APART), expected)
    assert "within_records" not in model.config.to_json_string(use_diff=False)


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_a_model_with_an_attention_of_its_own_stays_as_it_is(family):
    model = model_of(family)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    assert not use_attention_within_records(model)
    assert torch.equal(model(ids).logits, before)


def test_an_encoder_takes_the_ends_of_the_texts_and_their_padding():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    encoder = BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()
    ids = torch.randint(50, (2, LENGTH))
    mask = (torch.arange(LENGTH) < torch.tensor([[7], [LENGTH]])).long()
    expected = encoder(ids, attention_mask=mask).last_hidden_state
    assert use_attention_within_records(encoder)
    ends = torch.tensor([0, 7, 12, 24, 24], dtype=torch.int32)
    found = encoder(ids, attention_mask=as_mask(ends)).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder(ids, attention_mask=mask).last_hidden_state, expected)


def test_an_encoder_whose_layers_differ_stays_as_it_is():
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    encoder = ModernBertModel(ModernBertConfig(vocab_size=50, pad_token_id=0, **sizes))
    assert not use_attention_within_records(encoder)


def test_mask_of_records():
    expected = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
    for row, begin, end in ((0, 0, 5), (0, 5, 9), (0, 9, 12), (1, 0, 12)):
        expected[row, begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
    assert torch.equal(records_mask(ENDS, 2, LENGTH), expected[:, None])
    assert torch.equal(records_mask(ENDS, 2, LENGTH, sliding_window=3), expected[:, None].triu(-2))
    both_sides = records_mask(ENDS, 2, LENGTH, is_causal=False)
    assert torch.equal(both_sides, (expected | expected.mT)[:, None])


@pytest.mark.gpu
@pytest.mark.parametrize("sliding_window", [None, 40])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("n_keys", [4, 2])
def test_flash_attention_within_records_equals_the_masked_one(n_keys, is_causal, sliding_window):
    if sliding_window is not None and not is_causal:
        pytest.skip("an encoder has no sliding window")
    torch.manual_seed(0)
    ends = torch.tensor([0, 100, 130, 256, 456, 512, 512, 512], dtype=torch.int32, device="cuda")
    shapes = [(2, heads, 256, 64) for heads in (4, n_keys, n_keys)]
    given = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    weights = torch.randn(2, 256, 4, 64, device="cuda")

    class Layer(nn.Module):
        num_key_value_groups = 4 // n_keys

        def __init__(self):
            super().__init__()
            self.is_causal = is_causal

    def outputs(dtype):
        converted = [part.to(dtype) for part in given]
        output, _ = attend_within_records(Layer(), *converted, as_mask(ends), sliding_window=sliding_window)
        return output, *torch.autograd.grad((output.float() * weights).sum(), given)

    for flash, masked in zip(outputs(torch.bfloat16), outputs(torch.float32), strict=True):
        torch.testing.assert_close(flash.float(), masked, rtol=0.03, atol=0.1)
    dropped = attend_within_records(Layer(), *[part.bfloat16() for part in given], as_mask(ends), dropout=0.5)[0]
    assert not torch.allclose(dropped.float(), outputs(torch.float32)[0], atol=0.1)


@pytest.mark.gpu
def test_flash_attention_within_records_can_be_compiled():
    torch.manual_seed(0)
    model = model_of("gpt2").cuda().bfloat16()
    assert use_attention_within_records(model)
    ids = torch.randint(50, (2, LENGTH), device="cuda")
    positions, ends = POSITIONS_WITH_PADDING_APART.cuda(), ENDS.cuda()

    def loss():
        logits = model(ids, attention_mask=as_mask(ends), position_ids=positions, use_cache=False).logits
        return logits.float().square().mean()

    def outputs(function):
        model.zero_grad()
        value = function()
        value.backward()
        return value.detach(), model.transformer.wte.weight.grad.float().clone()

    eager, compiled = outputs(loss), outputs(torch.compile(loss))
    torch.testing.assert_close(compiled, eager, rtol=0.1, atol=0.05)
