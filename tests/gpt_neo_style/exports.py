"""A fine-tuned GPT-Neo that is exported."""

from pathlib import Path

from exported import Exported, decoder, with_large_weights
from tiny_bases import CONTEXT, save_gpt_neo

from datamodules.tokenizers import byte_tokenizer
from lightning_modules.gpt_neo_style import GPTNeoStyleModule


def fine_tuned(folder: Path) -> Exported:
    """Return a GPT-Neo with local attention."""
    module = GPTNeoStyleModule(str(save_gpt_neo(folder.with_name("gpt_neo"))), vocab_size=257, block_size=CONTEXT)
    return decoder(folder, with_large_weights(module, 0.7), byte_tokenizer(), "GPTNeoForCausalLM")


MODELS = {"fine_tuned": fine_tuned}
