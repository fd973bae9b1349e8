"""A model that answers questions, with adapters: it is exported with the prompts of its training."""

import json
from pathlib import Path
from typing import Any

import torch
from exported import Exported, with_large_weights
from torch import nn

from datamodules.gpt2_webglm_qa.chat_format import as_chat_template
from datamodules.gpt2_webglm_qa.prompts import TEMPLATE, PromptEncoder
from datamodules.tokenizers import byte_tokenizer
from lightning_modules.finetuning.adapters import adapted_layers, add_adapters
from lightning_modules.gpt2_webglm_qa import GPT2WebGLMQAModule
from lightning_modules.models.linear_layers import linear_layers

CONTEXT = 160
QUESTION, REFERENCES = 'Who said "a {b}"?', ["Ann  said\nit. ", "Bob."]


def with_adapters(folder: Path) -> Exported:
    """Return a GPT-2 with adapters that change its outputs."""
    sizes = {"vocab_size": 257, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
    module = GPT2WebGLMQAModule("none", 257, CONTEXT, architecture={"model_type": "gpt2"} | sizes)
    with_large_weights(module, 0.3)
    add_adapters(module, [name for name in linear_layers(module) if "attn" in name], rank=2, alpha=4)
    for layer in adapted_layers(module).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.5)
    question = {"kind": "chat", "question": QUESTION, "references": REFERENCES}
    return Exported(folder, module, byte_tokenizer(), question, check, chat_template=as_chat_template(TEMPLATE))


def check(model: Exported, said: dict[str, Any]) -> None:
    """Check the prompts and the answer; Transformers gives a GPT-2 special tokens that this vocabulary lacks."""
    prompts, end = PromptEncoder(model.tokenizer, TEMPLATE, CONTEXT), model.tokenizer.eos_token_id
    ids = prompts.prompt(QUESTION, REFERENCES, 8).ids.tolist()
    assert said["ids"] == ids
    text = model.tokenizer.decode(ids)
    assert text.startswith("[1] Ann said it.\n[2] Bob.\n")
    assert said["record"] == f"{text} So.{model.tokenizer.eos_token}"
    alone = torch.from_numpy(prompts.prompt(QUESTION, [], 8).ids.astype("int64"))[None]
    new = [int(token) for token in model.module.generate(alone, CONTEXT - alone.shape[1], temperature=0)]
    assert said["answer"] == model.tokenizer.decode(new[: new.index(end)] if end in new else new)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((model.folder / name).read_text())
        assert (settings.get("bos_token_id"), settings["eos_token_id"]) == (None, end)


MODELS = {"with_adapters": with_adapters}
