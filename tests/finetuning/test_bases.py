"""Bases from anywhere: they are loaded ready for training, checked against the data, and generate with a cache."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_bases import CONTEXT, save_gpt_neo, save_old_bert
from torch import nn

from datamodules.tokenizers import byte_tokenizer
from lightning_modules.finetuning.bases import (
    architecture_of,
    check_fit,
    check_padding,
    context_of,
    is_new,
    load_pretrained,
)
from lightning_modules.finetuning.causal_lm import CachedHubModel, FineTunedCausalLM
from lightning_modules.models.generation import generate
from lightning_modules.runtime import private_names


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt_neo(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/topic/name", "does not exist: give a folder .*, or a hub name$"),
        (".", "holds no config.json, nor a model/ that does"),
        ("nobody/nothing", "nobody/nothing, which is no local folder, from the Hugging"),
        ("broken", "model.base: AutoModelForCausalLM could not load broken"),
    ],
)
def test_a_base_that_cannot_be_loaded_is_refused_in_one_line(name, message):
    Path("broken").mkdir()
    Path("broken/config.json").write_text('{"model_type": "gpt_neon"}')
    with pytest.raises(MisconfigurationException, match=message) as caught:
        FineTunedCausalLM(name, vocab_size=257, block_size=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"", "SafetensorError: Error while deserializing header"),
        ("model.safetensors", None, "SafetensorError: Error while deserializing header"),
        ("config.json", b'{"model_type": "gpt_neo", "num_layers": null}', "Validation"),
    ],
)
def test_a_base_with_a_damaged_file_is_refused_in_one_line(base, tmp_path, file, content, message):
    folder = shutil.copytree(base, tmp_path / "base")
    half = (folder / file).read_bytes()[:-1000]
    (folder / file).write_bytes(half if content is None else content)
    with pytest.raises(MisconfigurationException, match=rf"^model\.base: .* could not load .*{message}") as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 300, "block_size": 8}, "data.tokenizer: it has 300 tokens, more than the 257 of"),
        (
            {"vocab_size": 257, "block_size": CONTEXT + 1},
            "data.block_size: 33 is longer than the context of .*, 32",
        ),
        ({"block_size": 8}, "model: vocab_size must be set"),
    ],
)
def test_data_that_does_not_fit_the_base_is_refused(base, sizes, message):
    with pytest.raises(MisconfigurationException, match=message):
        FineTunedCausalLM(str(base), **sizes)


def test_an_encoder_is_no_causal_language_model(tmp_path):
    folder = save_old_bert(tmp_path / "encoder")
    with pytest.raises(MisconfigurationException, match=r"for a token depend on later tokens, so it is .* an encoder"):
        FineTunedCausalLM(str(folder), vocab_size=64, block_size=8)
    load_pretrained(str(folder), "AutoModelForMaskedLM")


@pytest.mark.parametrize(
    "architecture", [{}, {"n_layer": 1}, {"model_type": "nobody"}, {"model_type": "gpt2", "n_embd": "a"}]
)
def test_an_architecture_that_is_none_is_one_line(architecture):
    with pytest.raises(
        MisconfigurationException, match=r"model\.architecture is none of Transformers \(.*leave it out"
    ):
        load_pretrained("base", architecture=architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_data_a_base_is_built_from_its_configuration_alone(base, dtype, request):
    loaded = load_pretrained(str(base))
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(dtype)
    with private_names.without_data():
        model = load_pretrained(str(base))
        again = load_pretrained(str(base), architecture=architecture_of(loaded))
    sizes = {name: (weight.shape, dtype) for name, weight in loaded.named_parameters()}
    for built in (model, again):
        assert not any(private_names.has_data(weight) for weight in built.parameters())
        assert built.training
        assert {name: (weight.shape, weight.dtype) for name, weight in built.named_parameters()} == sizes


def test_a_loaded_model_is_in_training_mode(base):
    module = FineTunedCausalLM(str(base), 257, 8)
    assert all(part.training for part in module.modules())  # Transformers returns it in evaluation mode


def test_weights_that_the_base_lacks_are_named(base, capsys):
    model = load_pretrained(str(base), "AutoModelForSequenceClassification", num_labels=3)
    assert capsys.readouterr().err == f"{base} has no score.weight: initialised at random\n"
    assert model.score.weight.shape == (3, 16)
    assert [name for name, parameter in model.named_parameters() if is_new(parameter)] == ["score.weight"]
    assert torch.equal(model.transformer.wte.weight, load_pretrained(str(base)).transformer.wte.weight)


def test_cached_generation_equals_uncached_generation_also_past_the_context(base):
    model = load_pretrained(str(base)).eval()
    for seed, (name, parameter) in enumerate(model.named_parameters()):  # large positions, so that they matter
        std = 2.0 if "wpe" in name else 0.4
        nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(seed))
    read = ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    found = torch.stack(list(generate(CachedHubModel(model), ids, 60, temperature=0)), dim=1)
    expected = []
    with torch.no_grad():
        for _ in range(60):
            if read.size(1) > CONTEXT:  # the cache is full: the last half of the context is read again
                read = read[:, -CONTEXT // 2 :]
            expected.append(model(read, use_cache=False).logits[:, -1].argmax(-1))
            read = torch.cat([read, expected[-1][:, None]], dim=1)
    assert found.tolist() == torch.stack(expected, dim=1).tolist()
    assert len(set(found[0].tolist())) > 5


@pytest.mark.parametrize(("pad_token", "is_refused"), [("a", True), ("b", False), (None, False)])
def test_positions_that_are_counted_from_another_padding_token_are_refused(pad_token, is_refused):
    from transformers import AutoConfig, AutoModel

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad_token
    sizes = SMALL | {"vocab_size": 257, "pad_token_id": ord("b"), "max_position_embeddings": 120}
    model = AutoModel.from_config(AutoConfig.for_model("roberta", **sizes))
    if is_refused:
        with pytest.raises(MisconfigurationException, match=r"has the id 97, and base .* other than 98; give"):
            check_padding(model, "base", tokenizer)
    else:
        check_padding(model, "base", tokenizer)
    check_padding(AutoModel.from_config(AutoConfig.for_model("bert", **SMALL)), "base", tokenizer)
    check_padding(model, "base", None)


SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("model_type", "settings", "context"),
    [
        ("bert", {"max_position_embeddings": 20}, 20),
        ("roberta", {"max_position_embeddings": 20, "pad_token_id": 1}, 18),  # positions begin after the padding's
        ("xlm-roberta", {"max_position_embeddings": 20, "pad_token_id": 0}, 19),
        ("xlnet", {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8}, None),
        ("bloom", {"n_layer": 1, "n_head": 2}, None),
    ],
)
def test_the_context_is_the_longest_sequence_that_a_model_takes(model_type, settings, context):
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model(model_type, **SMALL | settings))
    assert context_of(model) == context
    check_fit(model, "base", 40, context or 1000)
    with torch.no_grad():
        model(torch.full((1, context or 30), 5))
    with pytest.raises(MisconfigurationException, match="it has 41 tokens, more than the 40 of base"):
        check_fit(model, "base", 41, 1)
    if context is not None:
        with pytest.raises(MisconfigurationException, match=f"longer than the context of base, {context} tokens"):
            check_fit(model, "base", 40, context + 1)
