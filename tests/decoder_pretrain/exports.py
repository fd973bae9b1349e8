"""Decoders that are exported: one in each format of Transformers, and one that Transformers has no class for."""

from functools import partial
from pathlib import Path
from typing import Any

from exported import LLAMA, NANOCHAT, Exported, decoder, with_large_weights

from datamodules.tokenizers import byte_tokenizer
from lightning_modules.decoder_pretrain import PretrainModule

SIZES = {"vocab_size": 257, "block_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 16}


def of_parts(folder: Path, its_class: str, **parts: Any) -> Exported:
    """Return a decoder of some parts."""
    return decoder(folder, with_large_weights(PretrainModule(**SIZES, **parts), 1.0), byte_tokenizer(), its_class)


def of_other_parts(folder: Path) -> Exported:
    """Return a decoder that is saved in the format of this project."""

    def check(model: Exported, said: dict[str, Any]) -> None:
        assert "llm_train_decoder" in said["error"]

    return Exported(folder, PretrainModule(**SIZES, qk_norm=True), byte_tokenizer(), {"kind": "unknown"}, check)


MODELS = {
    "gpt2": partial(of_parts, its_class="GPT2LMHeadModel"),
    "llama": partial(of_parts, its_class="LlamaForCausalLM", **LLAMA, n_kv_head=1),
    "nanochat": partial(of_parts, its_class="NanoChatForCausalLM", **NANOCHAT),
    "other_parts": of_other_parts,
}
