"""Associative recall with one attention head, many heads, one block and two blocks."""

from datamodules.attention_recall.data import AttentionRecallDataModule

__all__ = ["AttentionRecallDataModule"]
