"""Fine-tuning of a causal language model to the style of a book."""

from datamodules.gpt_neo_style.data import GPTNeoStyleDataModule

__all__ = ["GPTNeoStyleDataModule"]
