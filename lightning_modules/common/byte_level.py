"""Tokenizers whose tokens are sequences of bytes, not of characters."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it is slow to import
    from tokenizers import Tokenizer


def is_byte_level(tokenizer: "Tokenizer") -> bool:
    """Return whether the tokens are sequences of bytes, as those of GPT-2: each of their characters spells one."""
    return "ByteLevel(" in repr(tokenizer.decoder)  # alone, or in a sequence
