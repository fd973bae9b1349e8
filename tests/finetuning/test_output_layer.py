"""The loss of models of Transformers from the inputs of their output layer, and from their own scores."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from lightning_modules.common.targets import places_of_targets
from lightning_modules.finetuning.lora import add_adapters
from lightning_modules.finetuning.output_layer import OutputLayer

SIZES = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": 8,
    "num_key_value_heads": 2,
}
DROPOUTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Configuration changes, and whether the scores are a linear function, possibly soft-capped, of the last states.
FAMILIES = {
    "llama": ({}, True),
    "gemma2": ({"final_logit_softcapping": 0.1}, True),
    "gemma4": (
        {"final_logit_softcapping": 0.1, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
        | {"layer_types": ["full_attention"] * 2},
        True,
    ),
    "cohere": ({"logit_scale": 0.3}, False),
    "bert": (DROPOUTS, True),
}


def model_of(family: str):
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    sizes = SIZES | FAMILIES[family][0]
    if family == "gemma4":  # its configuration has one for text, one for images and one for sound
        sizes = {"text_config": sizes, "vision_config": None, "audio_config": None}
    return auto.from_config(AutoConfig.for_model(family, **sizes)).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(99, (2, 3, 11), generator=generator)
    targets[:, ::3] = -100
    return ids, targets


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", [False, True], ids=["everywhere", "at places"])
def test_the_loss_and_its_gradient_are_those_of_the_scores(family, chosen):
    model, (ids, targets) = model_of(family), batch()
    layer = OutputLayer(model)
    places = torch.from_numpy(places_of_targets(targets.numpy())) if chosen else None
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(2))
    nats = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="none")
    expected = nats @ weights.flatten() / weights[targets >= 0].sum()
    found = layer.cross_entropy(targets, places, weights, input_ids=ids)
    assert layer.reads_inputs == FAMILIES[family][1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, model), gradients(expected, model), rtol=1e-4, atol=1e-6)
    each = layer.nats_of_share(targets, places, input_ids=ids)
    torch.testing.assert_close(each.flatten(), nats if places is None else nats[places])
    assert layer.nats_of_share(targets[:0], places, input_ids=ids[:0]).shape == (0,)
    assert model(ids).logits.shape == (3, 11, 99)  # as before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixed", [True, False], ids=["bf16-mixed", "bf16-true"])
def test_a_linear_function_is_recognised_in_bfloat16(family, mixed):
    model = model_of(family)
    layer = OutputLayer(model if mixed else model.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        layer.prepare()
    assert layer.reads_inputs == FAMILIES[family][1]


def test_an_adapted_layer_gives_its_own_scores():
    model, (ids, targets) = model_of("llama"), batch()
    layer = OutputLayer(model)
    layer.prepare()
    assert layer.reads_inputs
    add_adapters(model, ["lm_head"], rank=2, alpha=4.0)
    nn.init.normal_(model.lm_head.lora_B["default"].weight)
    found = layer.cross_entropy(targets, input_ids=ids)
    assert not layer.reads_inputs
    torch.testing.assert_close(found, F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten()))
    places = torch.from_numpy(places_of_targets(targets.numpy()))
    torch.testing.assert_close(layer.cross_entropy(targets, places, input_ids=ids), found)


def test_finding_the_layer_leaves_frozen_modules_in_evaluation_mode():
    model = model_of("llama")
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    OutputLayer(model).prepare()
    assert [module.training for module in model.modules()] == modes


def test_places_are_those_of_the_targets_and_of_no_target_up_to_a_round_number():
    _, targets = batch()
    places = places_of_targets(targets.numpy())
    n = int((targets >= 0).sum())
    assert len(places) % 8 == 0
    assert places[:n].tolist() == (targets.flatten() >= 0).nonzero()[:, 0].tolist()
    assert set(targets.flatten()[places[n:]].tolist()) == {-100}
    everywhere = places_of_targets(targets.clamp_min(0).numpy())
    assert everywhere.tolist() == list(range(33))
    assert places_of_targets(targets[:0].numpy()).tolist() == []
