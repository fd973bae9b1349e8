"""Exported models of every topic in another program, which has Transformers and not this project.

One process answers all questions about them, since importing Transformers takes seconds.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import LLAMA, NANOCHAT
from other_program import LONG
from shared_runs import own_world
from tiny_bases import CONTEXT, save_gpt_neo
from torch import nn

from datamodules.bert_imdb import BertImdbDataModule, FilmReviews
from datamodules.bert_imdb.wordpiece import learn_wordpieces
from datamodules.gpt2_webglm_qa.chat_format import as_chat_template
from datamodules.gpt2_webglm_qa.prompts import TEMPLATE, PromptEncoder
from datamodules.tokenizers import byte_tokenizer
from lightning_modules.bert_imdb import BertImdbModule, BertMaskedLMModule
from lightning_modules.bpe import BPEModule
from lightning_modules.decoder_pretrain import PretrainModule
from lightning_modules.finetuning.adapters import adapted_layers, add_adapters, linear_layers
from lightning_modules.gpt2_webglm_qa import GPT2WebGLMQAModule
from lightning_modules.gpt_neo_style import GPTNeoStyleModule
from lightning_modules.runtime.export import export_model

SIZES = {"vocab_size": 257, "block_size": CONTEXT}
DECODER = SIZES | {"n_layer": 2, "n_head": 2, "n_embd": 16}
PROMPTS = ["Hi", "A longer prompt"]
QUESTION, REFERENCES = 'Who said "a {b}"?', ["Ann  said\nit. ", "Bob."]
TEXTS = ["I would see it again.", "Never again. " * 60, "It was long, and then it was longer still."]
CLASSES = ["bad", "fair", "good"]


class Folder:
    """A model as another program gets it, with what this project says about it.

    Args:
        folder: Folder to create.
        module: Module to export.
        tokenizer: Its tokenizer.
    """

    def __init__(self, folder: Path, module: Any, tokenizer: Any) -> None:
        self.folder, self.module, self.tokenizer = folder, module.eval(), tokenizer

    def export(self, chat_template: str | None = None) -> None:
        """Export under an unusual umask."""
        before = os.umask(0o027)
        try:
            export_model(self.module, self.tokenizer, self.folder, chat_template)
        finally:
            os.umask(before)

    def stop_soon(self, prompt: str) -> None:
        """Make a token that follows a prompt the end-of-text token."""
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        free = [int(token) for token in self.module.generate(ids, 20, temperature=0)]
        fit = [token for token in free if token not in self.tokenizer("".join(PROMPTS))["input_ids"]]
        self.tokenizer = copy.deepcopy(self.tokenizer)
        end = next((token for token in fit if token not in free[:2]), fit[0])
        self.tokenizer.eos_token = self.tokenizer.convert_ids_to_tokens(end)


def with_large_weights(module: nn.Module, std: float) -> nn.Module:
    """Replace the matrices of a module, so that its outputs depend on the inputs."""
    for seed, parameter in enumerate(p for p in module.parameters() if p.dim() == 2):
        nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(seed))
    return module


def with_adapters(module: nn.Module) -> nn.Module:
    """Add adapters that change the outputs."""
    add_adapters(module, [name for name in linear_layers(module) if "attn" in name], rank=2, alpha=4)
    for layer in adapted_layers(module).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    return module


def bert(folder: Path, vocab_size: int) -> str:
    """Write a tiny BERT, and return its folder."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=vocab_size, max_position_embeddings=40, **sizes)).save_pretrained(folder)
    return str(folder)


def gpt2_for_questions() -> nn.Module:
    """Return a module of instruction tuning with adapters."""
    sizes = {"vocab_size": 257, "n_positions": 160, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": None}
    module = GPT2WebGLMQAModule("none", 257, 160, architecture={"model_type": "gpt2"} | sizes)
    return with_adapters(with_large_weights(module, 0.3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    """Models of every topic that exports, with random weights."""
    root = tmp_path_factory.mktemp("exported")
    with own_world(root):
        torch.manual_seed(0)
        reviews = [review.text for review in FilmReviews().reviews("test")]
        bytes_, words = byte_tokenizer(), learn_wordpieces(reviews, 400)
        words.model_max_length = 24
        encoder, sizes = bert(root / "bert", len(words)), {"vocab_size": len(words), "block_size": 24}
        learner = BPEModule(vocabulary_size=300, model_max_length=12)
        learner.merges = [(b"a", b"t"), (b"t", b"h"), (b"th", b"at")]
        made: dict[str, tuple[Callable[[], Any], Any]] = {
            "gpt2": (lambda: with_large_weights(PretrainModule(**DECODER), 1.0), bytes_),
            "llama": (lambda: with_large_weights(PretrainModule(**DECODER, **LLAMA, n_kv_head=1), 1.0), bytes_),
            "nanochat": (lambda: with_large_weights(PretrainModule(**DECODER, **NANOCHAT), 1.0), bytes_),
            "own": (lambda: PretrainModule(**DECODER, qk_norm=True), bytes_),
            "style": (
                lambda: with_large_weights(GPTNeoStyleModule(str(save_gpt_neo(root / "neo")), **SIZES), 0.7),
                bytes_,
            ),
            "questions": (gpt2_for_questions, bytes_),
            "reviews": (lambda: BertImdbModule(encoder, **sizes, classes=CLASSES), words),
            "mean": (lambda: BertImdbModule(encoder, "mean", "linear", **sizes, classes=CLASSES), words),
            "masked": (lambda: BertMaskedLMModule(n_layer=1, n_embd=16, pad_token_id=0, **sizes), words),
        }
        found = {name: Folder(root / name, build(), tokenizer) for name, (build, tokenizer) in made.items()}
        for name, model in found.items():
            if name in ("gpt2", "llama", "nanochat", "style"):
                model.stop_soon(PROMPTS[0])
            model.export(as_chat_template(TEMPLATE) if name == "questions" else None)
        learner.save_pretrained(root / "tokenizer")
        found["tokenizer"] = Folder(root / "tokenizer", learner, None)
    return found


@pytest.fixture(scope="module")
def answers(models: dict[str, Folder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the other program says about each model."""
    asked: dict[str, dict[str, Any]] = {
        name: {"kind": "decoder", "prompts": PROMPTS} for name in ("gpt2", "llama", "nanochat", "style")
    }
    asked["own"] = {"kind": "unknown"}
    asked["questions"] = {"kind": "chat", "question": QUESTION, "references": REFERENCES}
    asked["reviews"] = {"kind": "classifier", "texts": TEXTS, "trust": False}
    asked["mean"] = {"kind": "classifier", "texts": TEXTS, "trust": True}
    asked["masked"] = {"kind": "masked", "text": "a [MASK] film"}
    asked["tokenizer"] = {"kind": "tokenizer", "text": "that hat"}
    questions = [{"folder": str(models[name].folder)} | question for name, question in asked.items()]
    program = Path(__file__).parents[1] / "other_program.py"
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hub"))}
    done = subprocess.run(
        [sys.executable, "-P", program], input=json.dumps(questions), capture_output=True, text=True,
        env=os.environ | cache, cwd=cache["HF_HOME"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ours"] == []
    return dict(zip(asked, said["answers"], strict=True))


def continued(model: Folder, prompt: str) -> list[int]:
    """Return what this project writes after a prompt, until its end or that of the context."""
    ids = model.tokenizer(prompt)["input_ids"]
    tokens = model.module.generate(torch.tensor([ids]), CONTEXT - len(ids), temperature=0)
    new = [int(token) for token in tokens]
    end = model.tokenizer.eos_token_id
    return new[: new.index(end) + 1] if end in new else new


@pytest.mark.parametrize(
    ("name", "its_class"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("llama", "LlamaForCausalLM"),
        ("nanochat", "NanoChatForCausalLM"),
        ("style", "GPTNeoForCausalLM"),
    ],
)
def test_a_decoder_writes_what_it_writes_here_stops_pads_and_truncates(models, answers, name, its_class):
    model, said = models[name], answers[name]
    assert said["class"] == its_class
    assert said["context"] == said["truncated"] == said["full"] == CONTEXT
    assert said["end"] == [model.tokenizer.eos_token_id] * 3
    assert said["alone"] == [continued(model, prompt) for prompt in PROMPTS]
    assert said["alone"][0][-1] == model.tokenizer.eos_token_id
    assert len(said["alone"][0]) < 22
    longest = max(said["lengths"])
    for alone, together in zip(said["alone"], said["together"], strict=True):
        assert together[: len(alone)] == alone[: CONTEXT - longest]
    assert said["written"] == model.tokenizer.decode(said["alone"][0][:-1])


def test_a_model_of_questions_has_the_prompts_of_its_training_and_its_adapters_are_merged(models, answers):
    model, said = models["questions"], answers["questions"]
    prompts = PromptEncoder(model.tokenizer, TEMPLATE, 160)
    prompt = prompts.prompt(QUESTION, REFERENCES, 8)
    assert said["ids"] == prompt.ids.tolist()
    text = model.tokenizer.decode(prompt.ids.tolist())
    assert said["record"] == f"{text} So.{model.tokenizer.eos_token}"
    assert text.startswith("[1] Ann said it.\n[2] Bob.\n")
    alone = prompts.prompt(QUESTION, [], 8).ids
    tokens = [int(t) for t in model.module.generate(torch.tensor([alone.tolist()]), 160 - len(alone), temperature=0)]
    end = model.tokenizer.eos_token_id
    assert said["answer"] == model.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)


@pytest.mark.parametrize(
    ("name", "its_class"), [("reviews", "BertForSequenceClassification"), ("mean", "EncoderClassifier")]
)
def test_a_classifier_names_its_classes_truncates_and_pads(models, answers, name, its_class):
    model, said = models[name], answers[name]
    assert (said["class"], said["context"]) == (its_class, 24)
    batch = BertImdbDataModule.batch_of_texts(model.tokenizer, {"max_tokens": 24}, TEXTS)
    with torch.no_grad():
        ours = model.module(batch).softmax(-1).tolist()
    for row, alone, together in zip(ours, said["alone"], said["together"], strict=True):
        assert alone.keys() == set(CLASSES)
        assert alone == pytest.approx(dict(zip(CLASSES, row, strict=True)), abs=1e-5)
        assert together == pytest.approx(alone, abs=1e-5)


def test_a_masked_language_model_fills_the_mask_and_truncates(models, answers):
    model, said = models["masked"], answers["masked"]
    ids = torch.tensor([model.tokenizer("a [MASK] film")["input_ids"]])
    place = ids[0].tolist().index(model.tokenizer.mask_token_id)
    with torch.no_grad():
        scores = model.module.model(ids).logits[0, place]
    assert said == {"context": 24, "filled": scores.topk(5).indices.tolist(), "long": 5}


def test_a_learned_tokenizer_has_its_ids_its_context_and_its_end(models, answers):
    learner = models["tokenizer"].module
    ids = learner.rust_tokenizer(learner.merges).encode("that hat").ids
    assert answers["tokenizer"] == {"ids": ids, "context": 12, "end": "<|endoftext|>"}
    assert len(ids) < len("that hat")


def test_a_decoder_of_other_parts_is_refused_in_one_line(answers):
    assert "llm_train_decoder" in answers["own"]["error"]


def test_the_files_follow_the_umask_and_name_a_tokenizer_that_every_version_of_transformers_has(models):
    for name, model in models.items():
        if name != "tokenizer":
            modes = {path.name: oct(path.stat().st_mode & 0o777) for path in model.folder.iterdir()}
            assert modes == dict.fromkeys(modes, "0o640"), modes
            settings = json.loads((model.folder / "tokenizer_config.json").read_text())
            assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
            assert "is_local" not in settings


def test_a_classifier_of_the_end_of_a_text_truncates_its_beginning(models, tmp_path):
    tokenizer = models["reviews"].tokenizer
    tokenizer.save_pretrained(tmp_path / "words")
    data = BertImdbDataModule(FilmReviews(), str(tmp_path / "words"), 4, max_tokens=8, truncation="tail")
    export_model(models["reviews"].module, data.tokenizer, tmp_path / "model")
    from transformers import AutoTokenizer

    text = f"{LONG} I would see it again"
    read = AutoTokenizer.from_pretrained(tmp_path / "model")(text, truncation=True)["input_ids"]
    (row,) = data.batch_of_texts(data.tokenizer, {"max_tokens": 8, "truncation": "tail"}, [text])["input_ids"].tolist()
    assert read == row
