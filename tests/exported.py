"""Checks of an exported model through Transformers alone."""

import copy
import os
from pathlib import Path
from typing import Any

import torch

from lightning_modules.runtime.export import export_model

# Parts of the decoders that Transformers has classes for.
LLAMA: dict[str, Any] = {"positions": "rotary", "norm": "rms", "feed_forward": "swiglu"}
NANOCHAT: dict[str, Any] = {
    "positions": "rotary",
    "norm": "rms_unweighted",
    "feed_forward": "relu2",
    "qk_norm": True,
    "embedding_norm": True,
    "bias": False,
}
LONG = "A long text that no tiny context holds. " * 20


def export(module: Any, tokenizer: Any, folder: Path) -> Path:
    """Export a module under an unusual umask, check the modes of the files, and return the folder."""
    before = os.umask(0o027)
    try:
        export_model(module.eval(), tokenizer, folder)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, "0o640"), modes
    return folder


def check_generation(module: Any, tokenizer: Any, folder: Path, context: int, prompts: tuple[str, str]) -> None:
    """Export a module that generates, and check that other programs truncate, pad and stop.

    Args:
        module: Module with random weights.
        tokenizer: Its tokenizer, without a padding token.
        folder: Folder to create.
        context: Context of the model.
        prompts: Two texts of different lengths.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    first = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    free = [int(token) for token in module.generate(first, 20, temperature=0)]
    fit = [token for token in free if token not in tokenizer("".join(prompts))["input_ids"]]
    end = next((token for token in fit if token not in free[:2]), fit[0])  # make it the end-of-text token
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    export(module, tokenizer, folder)

    ours = free[: free.index(end) + 1]
    model, read = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert read.model_max_length == context
    assert model.config.eos_token_id == model.generation_config.eos_token_id == end
    assert len(read(LONG, truncation=True)["input_ids"]) == context
    found = model.generate(first, do_sample=False)[0, first.shape[1] :].tolist()
    assert found == ours
    alone = [model.generate(torch.tensor([read(text)["input_ids"]]), do_sample=False)[0] for text in prompts]
    batch = read(list(prompts), padding=True, return_tensors="pt")
    together = model.generate(**batch, do_sample=False)
    for text, row, tokens in zip(prompts, alone, together, strict=True):
        n = len(read(text)["input_ids"])
        new = row[n:].tolist()
        assert (
            tokens[batch["input_ids"].shape[1] :].tolist()[: len(new)] == new[: context - batch["input_ids"].shape[1]]
        )
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    (answer,) = generator(prompts[0], do_sample=False, return_full_text=False)
    assert answer["generated_text"] == read.decode(ours, skip_special_tokens=True)
    long = generator(prompts[1], do_sample=False, return_tensors=True, min_length=context)
    assert len(long[0]["generated_token_ids"]) == context
