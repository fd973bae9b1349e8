"""The tokenizer of learned merges: encoding, decoding, and the file `tokenizer.json`.

Training runs use the tokenizer that `to_tokenizer_json` exports. The `tokenizers` library runs it, in Rust, and gives
the same ids as the plain Python of `ByteLevelBPE`.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from lightning_modules.bpe.textbook import (
    GPT2_PATTERN,
    SINGLE_BYTES,
    Merge,
    spell,
    split_at_special_tokens,
    vocabulary,
    word_finder,
)


class ByteLevelBPE:
    """A byte-level tokenizer in plain Python, as an explanation and as a reference for tests.

    The time for a word grows with the square of its length; a cache holds the words that were encoded last.

    Args:
        merges: Pairs of tokens to merge, in the order in which they were learned.
        special_tokens: Texts that are tokens as a whole; they are searched before the text is split into words.
        pattern: Pattern of words, as in `count_words`.
    """

    def __init__(
        self, merges: Sequence[Merge], special_tokens: Sequence[str] = (), pattern: str = GPT2_PATTERN
    ) -> None:
        self.ids = vocabulary(merges, special_tokens)
        self.special_tokens = tuple(special_tokens)
        self._find_words = word_finder(pattern)
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        ordinary = SINGLE_BYTES + [left + right for left, right in merges]
        self._bytes = {self.ids[spell(token)]: token for token in ordinary}
        for token in special_tokens:
            if self._bytes.setdefault(self.ids[token], token.encode()) != token.encode():
                raise ValueError(f"special token {token!r} spells a learned token that stands for other bytes")
        self._word_ids = lru_cache(maxsize=1 << 16)(self._encode_word)

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids of a text, or of bytes of any kind; raise `ValueError` if the pattern loses text."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for number, part in enumerate(split_at_special_tokens(text, self.special_tokens)):
            if number % 2:
                ids.append(self.ids[part])
                continue
            words = self._find_words(part)
            if sum(map(len, words)) != len(part):
                raise ValueError(f"the pattern loses text: its matches joined do not give back {part[:40]!r}")
            for word in words:
                ids += self._word_ids(word)
        return ids

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that the ids stand for; raise `ValueError` if an id is not in the vocabulary.

        A token may be a part of a character; `.decode("utf-8", "replace")` turns any result into text.
        """
        try:
            return b"".join([self._bytes[token_id] for token_id in ids])
        except KeyError as error:
            raise ValueError(f"id {error} is not in the vocabulary of {len(self._bytes)} tokens") from None

    def _encode_word(self, word: str) -> list[int]:
        """Apply the merge that was learned first, at its leftmost position in the word, until none applies."""
        symbols = [SINGLE_BYTES[byte] for byte in word.encode("utf-8", "surrogateescape")]
        never = len(self._rank)
        while len(symbols) > 1:
            ranks = [self._rank.get(pair, never) for pair in pairwise(symbols)]
            first = min(ranks)
            if first == never:
                break
            left = ranks.index(first)
            symbols[left : left + 2] = [symbols[left] + symbols[left + 1]]
        return [self.ids[spell(symbol)] for symbol in symbols]


def to_tokenizer_json(
    merges: Sequence[Merge], special_tokens: Sequence[str] = (), pattern: str = GPT2_PATTERN
) -> dict[str, Any]:
    """Return the content of a `tokenizer.json`, which `tokenizers` and `AutoTokenizer` load.

    The library finds words with another engine (Oniguruma), which has other versions of the Unicode tables. The two
    patterns of `textbook.py` match the same text in both, except for characters that one of the tables lacks.
    """
    ids = vocabulary(merges, special_tokens)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[token], "content": token, **flags} for token in special_tokens],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": [[spell(left), spell(right)] for left, right in merges]},
    }
