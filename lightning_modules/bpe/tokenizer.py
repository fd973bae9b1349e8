"""The tokenizer that merges make: encoding, decoding, and the file `tokenizer.json`.

Training runs use the tokenizer that `to_tokenizer_json` exports. The `tokenizers` library runs it, in Rust, and gives
the same ids as the plain Python of `ByteLevelBPE`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Self

from lightning_modules.bpe.textbook import (
    GPT2_PATTERN,
    SINGLE_BYTES,
    Merge,
    spell,
    split_at_special_tokens,
    unspell,
    vocabulary,
    word_finder,
)


class ByteLevelBPE:
    """A tokenizer in plain Python, written to be read and to test others.

    The time for a word grows with the square of its length; a cache holds the words that were encoded last.

    Args:
        merges: Pairs in the order in which they were learned.
        special_tokens: Texts that stand for themselves; they are searched before the text is split into words.
        pattern: How text is split into words, as in `count_words`.
        ids: Id of every token by its spelling; by default `vocabulary(merges, special_tokens)`.

    Raises:
        ValueError: If the pattern or a special token is wrong, or `ids` lacks a token.
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        special_tokens: Sequence[str] = (),
        pattern: str = GPT2_PATTERN,
        ids: Mapping[str, int] | None = None,
    ) -> None:
        expected = vocabulary(merges, special_tokens)
        self.ids = expected if ids is None else dict(ids)
        if missing := expected.keys() - self.ids.keys():
            raise ValueError(f"the vocabulary lacks {len(missing)} tokens of the merges, such as {min(missing)!r}")
        self.special_tokens = tuple(special_tokens)
        self._find_words = word_finder(pattern)
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        ordinary = SINGLE_BYTES + [left + right for left, right in merges]
        self._bytes = {self.ids[spell(token)]: token for token in ordinary}
        for token in special_tokens:
            if self._bytes.setdefault(self.ids[token], token.encode()) != token.encode():
                raise ValueError(f"special token {token!r} spells a learned token that stands for other bytes")
        self._word_ids = lru_cache(maxsize=1 << 16)(self._encode_word)

    @classmethod
    def from_gpt2_files(cls, ids: Mapping[str, int], merge_lines: Iterable[str], pattern: str = GPT2_PATTERN) -> Self:
        """Return the tokenizer of the two files of GPT-2.

        A token of the vocabulary that is neither a byte nor the result of a merge is a special token, such as
        `<|endoftext|>`.

        Args:
            ids: Content of `vocab.json`.
            merge_lines: Lines of `merges.txt`.
            pattern: As in the constructor.

        Raises:
            ValueError: If a line is not two tokens, or the vocabulary lacks one.
        """
        merges: list[Merge] = []
        for number, line in enumerate(merge_lines, start=1):
            if line.startswith("#version") or not line.strip():
                continue
            try:
                left, right = map(unspell, line.split())
            except (KeyError, ValueError):
                raise ValueError(f"merges, line {number}: {line.rstrip()!r} is not two tokens") from None
            merges.append((left, right))
        special_tokens = sorted(ids.keys() - vocabulary(merges).keys(), key=ids.__getitem__)
        return cls(merges, special_tokens, pattern, ids)

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids of a text.

        Args:
            text: A text, or bytes, which need not be UTF-8.

        Raises:
            ValueError: If the pattern loses text.
        """
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
        """Return the bytes that the ids stand for.

        A token may be a part of a character; `.decode("utf-8", "replace")` makes a text of any result.

        Args:
            ids: Ids of tokens.

        Raises:
            ValueError: If an id is not in the vocabulary.
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
    patterns of `textbook.py` mean the same to both, except for characters that one of the tables does not contain.

    Args:
        merges: Pairs in the order in which they were learned.
        special_tokens: Texts that stand for themselves.
        pattern: How text is split into words.
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
