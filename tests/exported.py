"""Exported models: what a topic says about one in `tests/TOPIC/exports.py`, and checks of what another program says.

`exports.py` of a topic has `MODELS`, functions by name from an empty folder to an `Exported`.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
PROMPTS = ["Hi", "A longer prompt"]
TEXTS = ["I would see it again.", "Never again. " * 60 + "But it was long.", "It was long, and then it was longer."]


@dataclass
class Exported:
    """A model as another program gets it.

    Args:
        folder: Folder of the model, which `export` creates.
        module: Module to export.
        tokenizer: Its tokenizer.
        question: What the other program is asked, see `other_program.py`: `kind`, and arguments.
        check: Checks this model and the answer.
        its_class: Class of Transformers.
        chat_template: Chat template of the prompts.
    """

    folder: Path
    module: Any
    tokenizer: Any
    question: dict[str, Any]
    check: Callable[["Exported", dict[str, Any]], None]
    its_class: str = ""
    chat_template: str | None = None

    def export(self) -> None:
        """Export under an unusual umask."""
        before = os.umask(0o027)
        try:
            export_model(self.module.eval(), self.tokenizer, self.folder, self.chat_template)
        finally:
            os.umask(before)


def with_large_weights(module: nn.Module, std: float) -> Any:
    """Replace the matrices of a module, so that its outputs depend on the inputs."""
    for seed, parameter in enumerate(p for p in module.parameters() if p.dim() == 2):
        nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(seed))
    return module


def decoder(folder: Path, module: Any, tokenizer: Any, its_class: str) -> Exported:
    """Return a decoder that has an end-of-text token which it writes soon after the first prompt."""
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    free = [int(token) for token in module.generate(ids, 20, temperature=0)]
    fit = [token for token in free if token not in tokenizer("".join(PROMPTS))["input_ids"]]
    tokenizer = copy.deepcopy(tokenizer)
    end = next((token for token in fit if token not in free[:2]), fit[0])
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return Exported(folder, module, tokenizer, {"kind": "decoder", "prompts": PROMPTS}, check_decoder, its_class)


def check_decoder(model: Exported, said: dict[str, Any]) -> None:
    """Check that a decoder writes what it writes here, stops, pads, and truncates at its context."""
    context, end = said["context"], model.tokenizer.eos_token_id
    assert said["class"] == model.its_class
    assert context == said["truncated"] == said["full"]
    assert said["end"] == [end] * 3
    for prompt, written in zip(PROMPTS, said["alone"], strict=True):
        ids = model.tokenizer(prompt)["input_ids"]
        new = [int(t) for t in model.module.generate(torch.tensor([ids]), context - len(ids), temperature=0)]
        assert written == (new[: new.index(end) + 1] if end in new else new)
    assert said["alone"][0][-1] == end
    assert len(said["alone"][0]) < 22
    for alone, together in zip(said["alone"], said["together"], strict=True):
        assert together[: len(alone)] == alone[: context - max(said["lengths"])]
    assert said["written"] == model.tokenizer.decode(said["alone"][0][:-1])
