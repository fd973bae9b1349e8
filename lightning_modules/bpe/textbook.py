r"""Byte-pair encoding as in a textbook: the words, and merges of bytes, with all pairs counted again for each merge.

A language model reads integers. Byte-pair encoding (BPE) produces them in three steps:

1. A *pattern* splits the text into words (`" the"`, `"ing"`, `"!!"`), and the words are counted: no token crosses the
   border of a word.
2. Learning. Every word is a sequence of symbols, at first its UTF-8 bytes. The most frequent pair of neighbours becomes
   one new symbol in all words; then the next most frequent pair; until the vocabulary has the requested size. The
   result is the list of these *merges*, in order.
3. Encoding. A new word is split into bytes, and the merges are applied to it in the order in which they were learned.

Since it starts from bytes, every text has an encoding, and so has any other data (Radford et al., 2019). Merging the
most frequent pair is Gage's compression (1994), first used for text models by Sennrich et al. (2016,
arXiv:1508.07909).

This file implements steps 1 and 2. `learner.py` learns the same merges in a fraction of the time; `tokenizer.py`
encodes and decodes.

Ties and ids follow `BpeTrainer` of the `tokenizers` library with `min_frequency=0`, so that all merges are the same:

- the special tokens get the first ids, in their order; then the 256 bytes, in the order of their spellings (below);
  then the results of the merges, as they are learned;
- the pair with the highest count is merged, of several the one with the smallest left id, then the smallest right id.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import regex

Merge = tuple[bytes, bytes]

# --- words ------------------------------------------------------------------------------------------------------------

# GPT-2: a space belongs to the word that follows it; letters, digits and other characters do not mix. The alternative
# before the last leaves the last space of several to the word that follows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Similar to GPT-4: contractions in either case; any one sign may begin a word; a number is split into groups of three
# digits; and line ends stay with the punctuation or the indentation before them, which suits source code.
GPT4_PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# On ASCII text, which most text is, these patterns need no Unicode tables: the standard library's `re` finds the same
# words three times as fast as `regex`. (Each \p is in brackets above, so that replacing the text is correct.)
_ASCII_TWINS = {
    pattern: re.compile(pattern.replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9"), re.ASCII)
    for pattern in (GPT2_PATTERN, GPT4_PATTERN)
}


def count_words(
    texts: Iterable[str], pattern: str = GPT2_PATTERN, special_tokens: Sequence[str] = ()
) -> Counter[bytes]:
    """Return how often each word occurs in a corpus; the counts of its parts add up to the counts of the whole.

    A special token ends a word and is not counted (the trainer of the `tokenizers` library counts it as text).

    Args:
        texts: Documents, read one at a time. Bytes that are not UTF-8 are decoded by Python's `surrogateescape`.
        pattern: Pattern of words, for the `regex` module; its matches joined must give back the text.
        special_tokens: Texts that are tokens as a whole.

    Raises:
        ValueError: If the pattern does not compile, has a capturing group, or loses text.
    """
    find_words = word_finder(pattern)
    words: Counter[str] = Counter()
    size = 0
    for text in texts:
        for part in split_at_special_tokens(text, special_tokens)[::2]:
            words.update(find_words(part))
            size += len(part)
    if sum(len(word) * count for word, count in words.items()) != size:
        raise ValueError(f"the pattern loses text: its matches joined do not give back the text: {pattern!r}")
    del words[""]  # a pattern such as `\s*\S*` also matches at the end of a text
    counts: Counter[bytes] = Counter()
    for word, count in words.items():  # two strings with escaped bytes may be the same bytes
        counts[word.encode("utf-8", "surrogateescape")] += count
    return counts


def word_finder(pattern: str) -> Callable[[str], list[str]]:
    """Return the function that splits a text into words; raise `ValueError` if the pattern is wrong."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"the pattern does not compile: {error}: {pattern!r}") from None
    if compiled.groups:
        raise ValueError(f"the pattern has a group that captures: write (?:...) instead of (...): {pattern!r}")
    find = compiled.findall
    find_in_ascii = _ASCII_TWINS[pattern].findall if pattern in _ASCII_TWINS else find
    return lambda text: find_in_ascii(text) if text.isascii() else find(text)


def split_at_special_tokens(text: str, special_tokens: Sequence[str]) -> list[str]:
    """Return the parts of a text: ordinary text at even indices, special tokens at odd ones.

    Where two special tokens begin at the same position, the longer one is taken.
    """
    if not special_tokens:
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def _spell_bytes() -> list[str]:
    """Return one visible character per byte, as chosen for GPT-2: a vocabulary is stored as text."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))  # the space is the 33rd without a visible character: chr(256 + 32), "Ġ"
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


SPELLINGS = _spell_bytes()  # of the bytes 0 to 255
SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
_BYTES = {character: byte for byte, character in enumerate(SPELLINGS)}


def spell(token: bytes) -> str:
    """Return a token with one visible character per byte: `"Ġthe"` for `b" the"`."""
    return token.decode("latin-1").translate(SPELLINGS)  # type: ignore[arg-type]  # a list maps its indices


def unspell(spelling: str) -> bytes:
    """Return the token with this spelling; raise `KeyError` if a character spells no byte."""
    return bytes(_BYTES[character] for character in spelling)


def vocabulary(merges: Iterable[Merge] = (), special_tokens: Sequence[str] = ()) -> dict[str, int]:
    """Return the id of every token by its spelling: special tokens, then bytes, then the results of the merges.

    Raises:
        ValueError: If a special token is empty, is given twice, or is the spelling of a byte.
    """
    ids: dict[str, int] = {}
    for token in special_tokens:
        if token in ids:
            raise ValueError(f"special token {token!r} is given twice")
        if not token or token in _BYTES:
            raise ValueError(f"special token {token!r} is empty or one character that already stands for a byte")
        ids[token] = len(ids)
    for character in sorted(SPELLINGS):
        ids[character] = len(ids)
    for left, right in merges:
        ids.setdefault(spell(left + right), len(ids))  # one that spells a special token keeps that id
    return ids


# --- learning ---------------------------------------------------------------------------------------------------------


def learn_merges_textbook(
    word_counts: Mapping[bytes, int], vocab_size: int, special_tokens: Sequence[str] = ()
) -> list[Merge]:
    """Return the merges that `learn_merges` returns; slow, since it counts all pairs again for each merge."""
    check_vocab_size(word_counts, vocab_size, special_tokens)
    ids = vocabulary(special_tokens=special_tokens)
    words = {word: [SINGLE_BYTES[byte] for byte in word] for word in word_counts}
    merges: list[Merge] = []
    while len(ids) < vocab_size:
        pairs: Counter[Merge] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += word_counts[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], ids[spell(pair[0])], ids[spell(pair[1])]))
        merges.append((left, right))
        ids.setdefault(spell(left + right), len(ids))
        words = {word: _replace_pair(symbols, left, right) for word, symbols in words.items()}
    return merges


def _replace_pair(symbols: list[bytes], left: bytes, right: bytes) -> list[bytes]:
    """Return the symbols with each `left, right` joined, beginning at the left: `aa a` for `a a a`."""
    joined: list[bytes] = []
    for symbol in symbols:
        if joined and symbol == right and joined[-1] == left:
            joined[-1] = left + right
        else:
            joined.append(symbol)
    return joined


def check_vocab_size(word_counts: Mapping[bytes, int], vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Raise `ValueError` if there are no words, or no room for the bytes and the special tokens."""
    if not word_counts:
        raise ValueError("the corpus is empty: no words were counted")
    if vocab_size < (least := 256 + len(special_tokens)):
        raise ValueError(
            f"vocab_size {vocab_size} is smaller than 256 bytes + {len(special_tokens)} special tokens: "
            f"ask for at least {least}"
        )
