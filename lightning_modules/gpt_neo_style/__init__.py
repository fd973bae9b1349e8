"""A causal language model fine-tuned to the style of a book."""

from lightning_modules.gpt_neo_style.module import GPTNeoStyleModule
from lightning_modules.gpt_neo_style.report import StyleReport, StyleSamples

__all__ = ["GPTNeoStyleModule", "StyleReport", "StyleSamples"]
