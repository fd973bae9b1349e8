"""A causal language model fine-tuned to the style of a book."""

from datamodules.gpt_neo_style.data import GPTNeoStyleDataModule

__all__ = ["GPTNeoStyleDataModule"]
