"""Fine-tuning of a causal language model to the style of a book."""

from lightning_modules.gpt_neo_style.module import GPTNeoStyleModule
from lightning_modules.gpt_neo_style.report import StyleReport, StyleSamples

__all__ = ["GPTNeoStyleModule", "StyleReport", "StyleSamples"]
