"""Associative recall with one attention head, many heads, one block and two blocks."""

from lightning_modules.attention_recall.module import AttentionRecallModule
from lightning_modules.attention_recall.report import AttentionReport

__all__ = ["AttentionRecallModule", "AttentionReport"]
